"""The benchmarks at a real model's shapes, on shapes that take seconds."""

from __future__ import annotations

import gc
import json
import tempfile

import pytest
import torch

from benchmarks.train.scale.__main__ import main, parser, plan_of
from benchmarks.train.scale.clocks import Marks, Spans
from benchmarks.train.scale.contestants import DecodeCase, HeldRun
from benchmarks.train.scale.decode import GRAPH, DecodePlanned
from benchmarks.train.scale.floors import nbytes, parameters, step_bytes, step_flops, trunk_weights
from benchmarks.train.scale.forecast import on_meta, update_pflop
from benchmarks.train.scale.iteration import (
    PADDED,
    ROLLOUT,
    TOKENS,
    TRL,
    TRUNK,
    UPDATE,
    IterationBench,
    IterationCase,
    IterationRun,
    totals,
)
from benchmarks.train.scale.paper_stages import paper_form
from benchmarks.train.scale.record import AbsentError, Record
from benchmarks.train.scale.sizes import (
    QWEN_3B,
    TINY,
    build_backbone,
    build_model,
    random_pictures,
    random_text,
)
from benchmarks.train.scale.stages import CACHED, OURS, PAPER, StagesBench, StagesPlanned
from latent_rl.decode import Decoder
from latent_rl.models import LatentActionModel

CPU = torch.device("cpu")
H200_BYTES = 139 * 2**30


@pytest.fixture(scope="module")
def model():
    return build_model(TINY, CPU, torch.float32)


@pytest.fixture
def record(machine, tmp_path):
    made = Record("decode", machine, CPU, {"size": "tiny"}, dtype=torch.float32, folder=tmp_path)
    made.data["ceilings"].append({"copy_gb_per_s": 10.0, "gemm_gflop_per_s": {"float32": 50.0}})
    return made


# Shapes and bytes.


def test_the_published_shapes_have_the_published_number_of_parameters():
    backbone = build_backbone(QWEN_3B, torch.device("meta"), torch.bfloat16)
    assert parameters(backbone) == 3_754_622_976
    text = backbone.config.text_config
    assert (text.num_hidden_layers, text.vocab_size, text.rope_parameters["mrope_section"]) == (
        36, 151936, [16, 24, 24],
    )  # fmt: skip
    assert backbone.config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]


def test_every_planned_case_fits_the_memory_of_an_h200():
    model = on_meta(QWEN_3B)
    policy = model.latent.policy
    layer = parameters(policy.tower.layers[0])
    assert parameters(policy) == 8 * layer + 2048 + 128 * 2048
    for case in DecodePlanned().cases():
        plan = Decoder(model, slots=case.rows).plan(
            requests=case.rows,
            prompt_tokens=case.context,
            new_tokens=DecodePlanned().steps + 2,
            num_generations=case.group,
        )
        assert 0 < plan.cache_bytes < plan.total_bytes < H200_BYTES
    assert 0 < update_pflop(model, IterationCase())["latent, packed"] < 1


def test_bytes_of_a_step_are_those_of_the_weights_it_reads(model):
    bytes_ = step_bytes(model, [10, 20], [3] * 4, group=2)
    embeddings = model.decoder.get_input_embeddings().weight
    rest = parameters(model.backbone) * 4 - nbytes(model.backbone.model.visual.parameters())
    assert nbytes(trunk_weights(model)) + embeddings.nbytes == rest
    assert bytes_.trunk == rest - embeddings.nbytes + 4 * TINY.hidden * 4
    # Tied to the embeddings, and read whole for the scores.
    assert bytes_.head == embeddings.nbytes
    blocks = list(model.latent.merge.blocks)
    width = blocks[0].w_gate.shape[1]
    halves = sum(b.w_down.nbytes + (b.w_gate.nbytes + b.w_up.nbytes) // 2 for b in blocks)
    assert width == 2 * TINY.hidden
    assert bytes_.merge == halves + 4 * len(blocks) * 2 * TINY.intermediate * 4
    own = TINY.head_dim * TINY.kv_heads * 2 * 4 * (TINY.layers + TINY.policy_layers)
    assert bytes_.kv == own * (10 + 20 + 4 * (3 + 1))
    assert bytes_.kv_by_rows == own * (2 * (10 + 20) + 4 * (3 + 1))
    assert bytes_.total == bytes_.trunk + bytes_.policy + bytes_.merge + bytes_.head + bytes_.kv
    assert bytes_.floor_ms(2.0) == pytest.approx(bytes_.total / 2e6)
    assert step_flops(model, 8) == 8 * step_flops(model, 1)
    with pytest.raises(ValueError, match="own must be of 2 x 2 rows, got 3"):
        step_bytes(model, [1, 2], [3] * 3, group=2)


def test_keys_and_values_are_counted_as_the_engine_stores_them(model):
    decoder = Decoder(model, slots=4)
    plan = decoder.plan(requests=4, prompt_tokens=32, new_tokens=8, num_generations=4)
    read = step_bytes(model, [32], [7] * 4, group=4).kv
    assert plan.cache_bytes == read


def test_pictures_hold_as_many_placeholders_as_the_vision_tower_makes_tokens(model):
    inputs = random_pictures(TINY, 2, 12, CPU)
    trace = model.encode(inputs)
    assert not trace.text_only.any()
    assert trace.hidden.shape == (2, 12, TINY.hidden)
    with pytest.raises(ValueError, match="length must be >= 7"):
        random_pictures(TINY, 2, 6, CPU)
    text = random_text(TINY, 2, 12, CPU)["input_ids"]
    assert int(text.max()) < TINY.words
    assert not torch.equal(text[0], text[1])


# Clocks.


def test_marks_and_spans_measure_and_leave_nothing_behind():
    marks = Marks(CPU)
    for _ in range(3):
        marks.set()
    assert len(marks.gaps_ms()) == 2
    assert min(marks.gaps_ms()) >= 0

    class Owner:
        def work(self) -> int:
            return 7

    owner, spans = Owner(), Spans(CPU)
    with spans.around(owner, "work", "work_s"):
        assert owner.work() + owner.work() == 14
    assert "work" not in vars(owner)
    assert list(spans.seconds) == ["work_s"]
    assert spans.seconds["work_s"] > 0


# The record.


def test_what_goes_wrong_is_part_of_the_row(record):
    def fails(error):
        def measure():
            raise error

        return measure

    case = {"rows": 1}
    record.add(case, "a", lambda: {"step_ms": 1.0})
    record.add(case, "b", fails(AbsentError("not installed")))
    record.add(case, "c", fails(torch.OutOfMemoryError("no room\nfor it")))
    record.add(case, "d", fails(RuntimeError("broken")))
    # Not measured twice.
    record.add(case, "a", fails(RuntimeError("again")))
    saved = json.loads(record.path.read_text())["rows"]
    assert [(row["status"], row.get("reason")) for row in saved] == [
        ("measured", None),
        ("absent", "not installed"),
        ("out of memory", "no room"),
        ("failed", "RuntimeError: broken"),
    ]


def test_a_run_goes_on_where_it_stopped_on_the_same_commit_alone(record, machine, tmp_path):
    from dataclasses import replace

    record.add({"rows": 1}, "a", lambda: {"step_ms": 1.0})
    record.add({"rows": 1}, "b", lambda: 1 / 0)

    def again(settings, **changed):
        made = replace(machine, **changed)
        return Record("decode", made, CPU, settings, dtype=torch.float32, folder=tmp_path)

    # What failed is tried again.
    assert again({"size": "tiny"}).resume() == 1
    assert again({"size": "tiny"}, commit="another").resume() == 0
    assert again({"size": "tiny"}, dirty=True).resume() == 0
    assert again({"size": "tiny", "threads": 2}).resume() == 0


def test_no_row_is_begun_when_it_is_late(machine, tmp_path):
    late = Record(
        "decode", machine, CPU, {"size": "tiny"}, dtype=torch.float32, folder=tmp_path, minutes=0
    )
    late.add({"rows": 1}, "a", lambda: {"step_ms": 1.0})
    assert (late.left_out, late.rows) == (1, [])


def test_plans_take_the_fields_of_the_command_line():
    args = parser().parse_args(["decode", "--rows", "2", "4", "--compile-rows", "--steps", "9"])
    plan = plan_of(args)
    assert (plan.rows, plan.compile_rows, plan.steps) == ((2, 4), (), 9)
    assert plan.contexts == DecodePlanned().contexts
    groups = [(case.rows, case.group) for case in DecodePlanned(rows=(1, 8), contexts=(4,)).cases()]
    assert groups == [(1, 1), (8, 8), (8, 1)]


# Decoding.


def test_a_held_run_makes_the_steps_of_a_rollout(model):
    case, steps = DecodeCase(4, 10, 2), 6
    inputs = random_text(TINY, case.prompts, case.context, CPU)
    whole = Decoder(model, slots=4).generate(
        inputs, max_new_tokens=steps + 1, num_generations=case.group, seed=0
    )
    held = HeldRun(Decoder(model, slots=4), inputs, case, steps)
    for _ in range(2):
        assert held.advance(steps) > 0
        said = held.run._results.ids[: case.rows, : steps + 1]
        assert torch.equal(said[..., 0], whole.generation.completion_ids)
        assert torch.equal(said[..., 1], whole.generation.codes)
        held.run._results.ids.fill_(-1)
        parts = held.parts_ms()
        assert list(parts) == ["trunk", "policy", "tail"]
        assert min(parts.values()) > 0
        # The first tokens were said before the steps.
        held.run._results.ids[: case.rows, 0] = whole.generation.codes.new_zeros(())
        held.run._results.ids[: case.rows, 0, 0] = whole.generation.completion_ids[:, 0]
        held.run._results.ids[: case.rows, 0, 1] = whole.generation.codes[:, 0]


def test_decoding_has_a_row_for_every_contestant(tmp_path, capsys):
    made = main(
        ["decode", "--size", "tiny", "--device", "cpu", "--dtype", "bfloat16", "--out",
         str(tmp_path), "--rows", "2",
         "--contexts", "8", "--repeats", "1"]
    )  # fmt: skip
    assert [row["status"] for row in made.rows] == ["measured"] * 5
    for row in made.rows:
        assert row["step_ms"] > 0
        assert row["prefill_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["step_ms"])
    for row in (row for row in made.rows if row["contestant"] == GRAPH):
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["step_ms"])
        assert row["floor_ms"] == pytest.approx(row["bytes"]["total"] / row["copy_gb_per_s"] / 1e6)
        assert row["cache_bytes"] < row["planned_bytes"]
    assert made.path.is_file()
    assert made.path.with_suffix(".png").is_file()
    assert "the paper's loop" in capsys.readouterr().out


# An RL iteration.


def test_an_iteration_runs_as_on_a_gpu(machine, tmp_path):
    record = Record(
        "iteration", machine, CPU, {"size": "tiny"}, dtype=torch.bfloat16, folder=tmp_path
    )
    case = IterationCase(2, 2, prompt_tokens=12, steps=4, micro=4, token_micro=4, repeats=1)
    with tempfile.TemporaryDirectory() as folder:
        bench = IterationBench(TINY, case, record, folder)
        assert next(bench.model.latent.policy.parameters()).dtype == torch.float32
        replay, seconds = bench.roll_out()
        bench.take(replay)
        assert bench.replay.codes.shape == (4, 4)
        dtypes = []
        layer = bench.model.latent.policy.tower.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
        norms = [bench.update(replay), bench.trunk_update()]
        assert set(dtypes) == {torch.bfloat16}
        assert min(norms) > 0
        assert seconds["decode_s"] > 0


def test_an_iteration_has_its_parts_and_updates_agree(record, monkeypatch):
    case = IterationCase(2, 4, prompt_tokens=12, steps=5, micro=4, token_micro=4, repeats=1)
    run, alive = IterationRun(TINY, case, record), []
    token_update = run._token_update

    def watched(*args):
        alive.extend(o for o in gc.get_objects() if type(o) is LatentActionModel and o is not None)
        return token_update(*args)

    before = [o for o in gc.get_objects() if type(o) is LatentActionModel]
    monkeypatch.setattr(run, "_token_update", watched)
    run.measure()
    rows = {row["contestant"]: row for row in record.rows}
    assert rows.pop(TRL)["status"] == "absent"
    assert {row["status"] for row in rows.values()} == {"measured"}, rows
    # The token-level update's memory is its own.
    assert len(alive) == len(before)
    rollout = rows[ROLLOUT]
    parts = [rollout[name] for name in ("prefill_s", "decode_s", "reward_s", "keep_s")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(rollout["rollout_s"])
    norm = rows[UPDATE]["gradient_norm"]
    assert norm > 0
    for name in (PADDED, TRUNK):
        assert rows[name]["gradient_norm"] == pytest.approx(norm, rel=1e-3), name
    whole = totals(record, case.as_dict())
    assert len(whole) == 3
    assert whole["latent RL"]["update"] == rows[UPDATE]["update_s"]
    assert whole["token level, generate()"]["update"] == rows[TOKENS]["update_s"]


# The stages.


def test_the_paper_s_form_of_a_stage_has_the_same_loss(record):
    planned = StagesPlanned(rows=4, length=20, response=8, sft_layers=1, repeats=1)
    bench = StagesBench(TINY, planned, record)
    for stage in planned.stages():
        batch = bench.batch(stage)
        losses = []
        for loss in (lambda m, b, s=stage: s.loss(m, b).loss, paper_form(stage)):
            torch.manual_seed(1)
            losses.append(loss(bench.model, batch).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), stage.name


def test_stages_have_a_row_for_every_contestant(machine, tmp_path):
    # As on a GPU: a bfloat16 backbone, float32 latent modules, autocast.
    record = Record("stages", machine, CPU, {"size": "tiny"}, dtype=torch.bfloat16, folder=tmp_path)
    planned = StagesPlanned(rows=2, length=16, response=8, sft_layers=1, repeats=1)
    StagesBench(TINY, planned, record).measure()
    found = {(row["case"]["stage"], row["contestant"]): row for row in record.rows}
    assert len(found) == 5 * 3
    assert {name for _, name in found} == {OURS, CACHED, PAPER}
    absent = found.pop(("task_sft", CACHED))
    assert absent["status"] == "absent"
    assert {row["status"] for row in found.values()} == {"measured"}, found
    for row in found.values():
        assert row["step_ms"] > 0
        assert row["trained_parameters"] > 0
        assert row["peak_bytes"] is None
    for stage in ("joint", "inverse_warmup"):
        assert found[stage, OURS]["first_loss"] == pytest.approx(
            found[stage, PAPER]["first_loss"], rel=3e-2
        )
