import torch

from latent_rl.ops import code_logprobs, nearest_code, quantize, sample_codes

x = torch.randn(4096, 256, requires_grad=True)
codebook = torch.randn(512, 256, requires_grad=True)
codes = nearest_code(x, codebook)  # [4096], as float64 would choose; no 4096 x 512 matrix is made

out = quantize(x, codebook)  # straight-through output, both losses, usage, in one pass
loss = out.quantized.square().mean() + 0.25 * out.commitment_loss + out.codebook_loss
loss.backward()

logits = torch.randn(64, 512)
action = sample_codes(logits, temperature=0.7, top_p=0.9, seed=0)  # same seed, same codes anywhere
scored = code_logprobs(logits, action.codes, ref_logits=torch.zeros_like(logits))
print(action.codes[:8], scored.logprob.mean(), scored.kl.mean())
