// The Python face of latent_rl/_C.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA backends of latent_rl's ops; raw pointers in, nothing of torch.";
}
