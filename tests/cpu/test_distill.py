"""Distillation: the forward pass against transformers, losses against float64, runs against themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from twins import VOCAB_SIZE, load_truth, make_twin
from typer.testing import CliRunner

from sailfish.base.errors import BuildError, ConfigError
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.names import tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.cli.main import application
from sailfish.compress.block import Device, read_tensor
from sailfish.compress.distill import loss
from sailfish.compress.distill.loss import Aim, Divergence, Teacher, losses
from sailfish.compress.distill.make import Request, distill
from sailfish.compress.distill.report import Report
from sailfish.compress.distill.sampled import sample
from sailfish.compress.distill.stack import Head, Stack
from sailfish.compress.distill.train import Schedule
from sailfish.quality.evaluate import compare
from sailfish.quality.model import WindowModel
from sailfish.quality.windows import Window

LENGTH, N_HELD = 32, 4
SCHEDULE = Schedule(
    steps=6,
    batch=2,
    length=LENGTH,
    lr=1e-3,
    divergence="kl",
    alpha=0.9,
    temperature=1.0,
    seed=0,
    keep_zeros=True,
)


class Stopped(Exception):
    """What stops a run in the middle."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def unasked(prompts: Sequence[Sequence[int]], n_tokens: int, seed: int) -> list[list[int]]:
    """Write nothing: no text of the teacher is asked for."""
    raise AssertionError("the teacher was asked to write")


def tokens(directory: Path, n_windows: int = 40) -> Path:
    """Write ids that follow each other by a rule with noise, so that there is something to learn."""
    random = torch.Generator().manual_seed(3)
    ids = [1]
    for jump in torch.randint(0, 3, (n_windows * LENGTH - 1,), generator=random).tolist():
        ids.append((ids[-1] * 5 + 7 + jump) % VOCAB_SIZE)
    path = directory / "tokens.json"
    path.write_text(json.dumps(ids), encoding="utf-8")
    return path


def asked(teacher: Path, student: Path, text: Path, schedule: Schedule = SCHEDULE) -> Request:
    """Return a small request on the CPU."""
    return Request(
        teacher=teacher,
        student=student,
        schedule=schedule,
        text=text,
        evaluation=None,
        n_evaluation=N_HELD,
        n_sampled=0,
        write=unasked,
        on=Device(target="cpu", dtype="float32"),
        device_name="a CPU",
        save_every=2,
        resume=False,
    )


def made(request: Request, out: Path) -> tuple[Report, dict[str, Tensor]]:
    """Distill, and return the report and the weights written."""
    report = distill(request, out, silent)
    assert report is not None
    return report, weights(out)


def weights(directory: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def pruned_child(teacher: Path, to: Path) -> Path:
    """Write the teacher with the smaller two of every four weights of its MLPs gone."""
    shutil.copytree(teacher, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    found = weights(teacher)
    for name, weight in found.items():
        if ".mlp." in name and weight.ndim == 2:
            groups = weight.view(len(weight), -1, 4)
            keep = groups.abs().argsort(-1).argsort(-1) >= 2
            found[name] = (groups * keep).view(weight.shape).contiguous()
    save_file(found, to / "model.safetensors")
    return to


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin whose head is tied, with biases."""
    return make_twin("llama_tied", tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "glm4"])
def test_logits_and_gradients_are_those_of_transformers(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of every weight by its name: biases, caps, windows, fused and interleaved projections."""
    path = make_twin(family, tmp_path_factory.getbasetemp())
    token_BL = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    truth = load_truth(path)
    expected = truth(token_BL).logits
    expected.logsumexp(-1).sum().backward()
    config, checkpoint = load_model_config(path), Checkpoint.open(path)
    names = [source for spec in tensor_specs(config) for source in spec.sources]
    stack = Stack(config, {name: read_tensor(checkpoint, name) for name in names}, recompute=True)
    logits = stack.head().logits(stack(token_BL).flatten(0, 1))
    logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(logits.view(expected.shape), expected, rtol=1e-4, atol=2e-4)
    true_grads = {name: parameter.grad for name, parameter in truth.named_parameters()}
    for name, parameter in stack.checkpoint_parameters().items():
        assert parameter.grad is not None and true_grads[name] is not None, name
        apart = (parameter.grad - true_grads[name]).norm() / true_grads[name].norm()
        assert apart < 1e-4, f"{name}: {apart:.2e}"


def test_logits_of_experts_are_those_of_the_engine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A router and its experts have gradients too."""
    path = make_twin("qwen3_moe", tmp_path_factory.getbasetemp())
    config, checkpoint = load_model_config(path), Checkpoint.open(path)
    names = [source for spec in tensor_specs(config) for source in spec.sources]
    stack = Stack(config, {name: read_tensor(checkpoint, name) for name in names})
    tokens_L = list(range(40))
    hidden_LD = stack(torch.tensor([tokens_L]))[0]
    model = WindowModel.of_checkpoint(path, window_tokens=40)
    torch.testing.assert_close(hidden_LD, model.hidden(tokens_L), rtol=1e-4, atol=1e-4)
    hidden_LD.square().sum().backward()
    assert all(p.grad is not None for name, p in stack.checkpoint_parameters().items() if "head" not in name)


@pytest.mark.parametrize("divergence", ["kl", "tvd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_in_chunks_is_the_whole_one_in_float64(
    divergence: Divergence, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, and gradients of the states and of the head, behind a cap."""
    monkeypatch.setitem(loss._CHUNK_LOGITS, "cpu", 7 * 20)
    random = torch.Generator().manual_seed(5)
    hidden_SD, head_VD, other_SD, other_VD = (
        torch.randn(*shape, generator=random) for shape in ((23, 8), (20, 8), (23, 12), (20, 12))
    )
    target_S = torch.randint(0, 20, (23,), generator=random)
    cap = 2.0
    aim = Aim(divergence=divergence, alpha=0.7, temperature=temperature)
    ours = [hidden_SD.clone().requires_grad_(), head_VD.clone().requires_grad_()]
    found = losses(
        aim,
        ours[0],
        Head(weight_VD=ours[1], softcap=cap),
        Teacher(hidden_SD=other_SD, head=Head(weight_VD=other_VD, softcap=None)),
        target_S,
    )
    (3 * found[0]).backward()

    theirs = [hidden_SD.double().requires_grad_(), head_VD.double().requires_grad_()]
    logits_SV = torch.tanh(theirs[0] @ theirs[1].T / cap) * cap
    q_SV = (logits_SV / temperature).softmax(-1)
    p_SV = (other_SD.double() @ other_VD.double().T / temperature).softmax(-1)
    if divergence == "kl":
        apart, scale = (p_SV * (p_SV.log() - q_SV.log())).sum(-1).mean(), temperature**2
    else:
        apart, scale = 1 - torch.minimum(p_SV, q_SV).sum(-1).mean(), 1.0
    cross = -logits_SV.log_softmax(-1).gather(1, target_S[:, None]).mean()
    truth = torch.stack((0.7 * scale * apart + 0.3 * cross, apart, cross))
    (3 * truth[0]).backward()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


def test_a_pruned_child_is_repaired_and_keeps_its_zeros(teacher: Path, tmp_path: Path) -> None:
    """Its report's figures are those of what was written, and better than before beyond their intervals."""
    student, text = pruned_child(teacher, tmp_path / "child"), tokens(tmp_path)
    schedule = msgspec.structs.replace(SCHEDULE, steps=30, batch=4, lr=3e-3, alpha=1.0)
    report, after = made(asked(teacher, student, text, schedule), tmp_path / "out")
    before = weights(student)
    assert report.n_held_zeros == sum(".mlp." in n and w.ndim == 2 for n, w in before.items())
    for name, weight in before.items():
        assert not torch.equal(after[name], weight), name
        if ".mlp." in name and weight.ndim == 2:
            assert not after[name][weight == 0].any(), name
    assert report.gain.kl.high < 0 < report.gain.acceptance.low
    assert report.curve[-1].divergence < report.curve[0].divergence
    ids = json.loads(text.read_text())
    held = [Window(tokens=ids[-k * LENGTH :][:LENGTH]) for k in range(N_HELD, 0, -1)]
    models = [WindowModel.of_checkpoint(p, window_tokens=LENGTH) for p in (tmp_path / "out", teacher)]
    summary = compare(models[0], models[1], held).summary()
    assert summary.acceptance.value == pytest.approx(report.after.acceptance.value, rel=1e-6)
    assert summary.perplexity.value == pytest.approx(report.after.perplexity.value, rel=1e-6)


def test_zeros_that_are_free_become_weights(teacher: Path, tmp_path: Path) -> None:
    """Asked for, nothing is held."""
    student, text = pruned_child(teacher, tmp_path / "child"), tokens(tmp_path)
    schedule = msgspec.structs.replace(SCHEDULE, keep_zeros=False, steps=2)
    report, after = made(asked(teacher, student, text, schedule), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert report.n_held_zeros == 0
    assert after[name][weights(student)[name] == 0].any()


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(teacher: Path, tmp_path: Path) -> None:
    """Bit for bit; the state is gone in the end."""
    student, text = pruned_child(teacher, tmp_path / "child"), tokens(tmp_path)
    request = asked(teacher, student, text)
    _, whole = made(request, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if done == 5:
            raise Stopped

    out = tmp_path / "parts"
    with pytest.raises(ConfigError, match="to go on from"):
        distill(replace(request, resume=True), out, silent)
    with pytest.raises(Stopped):
        distill(request, out, stop)
    assert [place.name for place in (tmp_path / "parts.state").iterdir()] == ["step-4"]
    with pytest.raises(ConfigError, match="stopped"):
        distill(request, out, silent)
    with pytest.raises(ConfigError, match="lr 0.001 then, 0.002 now"):
        other = msgspec.structs.replace(SCHEDULE, lr=2e-3)
        distill(replace(request, resume=True, schedule=other), out, silent)
    with pytest.raises(ConfigError, match="another teacher, student or text"):
        distill(replace(request, resume=True, student=teacher), out, silent)
    state = tmp_path / "parts.state" / "step-4" / "state.json"
    kept = state.read_bytes()
    state.write_bytes(kept[:-1])
    with pytest.raises(ConfigError, match="is not a run's state"):
        distill(replace(request, resume=True), out, silent)
    state.write_bytes(kept)
    report, resumed = made(replace(request, resume=True), out)
    assert [point.step for point in report.curve] == list(range(SCHEDULE.steps))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "parts.state").exists()


def test_text_that_the_teacher_writes_is_learned_from_and_kept_for_a_resumed_run(
    teacher: Path, tmp_path: Path
) -> None:
    """It is asked for once, with beginnings of the text's windows."""
    student, text = pruned_child(teacher, tmp_path / "child"), tokens(tmp_path)
    calls: list[int] = []

    def write(prompts: Sequence[Sequence[int]], n_tokens: int, seed: int) -> list[list[int]]:
        calls.append(len(prompts))
        starts = {tuple(ids[k : k + len(prompts[0])]) for k in range(0, len(ids), LENGTH)}
        assert all(tuple(prompt) in starts for prompt in prompts)
        return [[seed % VOCAB_SIZE] * n_tokens for _ in prompts]

    def stop(what: str, done: int, total: int) -> None:
        if what == "training":
            raise Stopped

    ids = json.loads(text.read_text())
    request = replace(asked(teacher, student, text), n_sampled=70, write=write)
    with pytest.raises(Stopped):
        distill(request, tmp_path / "out", stop)
    kept = json.loads((tmp_path / "out.state" / "sampled.json").read_text())
    assert len(kept) == 70 and all(len(window) == LENGTH for window in kept)
    with pytest.raises(ConfigError, match="holds 70 windows, 71 are asked for"):
        distill(replace(request, resume=True, n_sampled=71), tmp_path / "out", silent)
    sampled = tmp_path / "out.state" / "sampled.json"
    sampled.write_text("[[1, 2")
    with pytest.raises(ConfigError, match="holds no windows"):
        distill(replace(request, resume=True), tmp_path / "out", silent)
    sampled.write_text(json.dumps(kept), encoding="utf-8")
    report, _ = made(replace(request, resume=True), tmp_path / "out")
    assert calls == [64, 6]
    assert (report.n_sampled, report.n_windows) == (70, 82)


def test_the_command_has_the_teacher_write_through_the_engine(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each time on one beginning; then trains, and says what it gained."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept: list[list[int]] = []

    def kept_too(*parts: Any, seed: int) -> list[list[int]]:
        kept.extend(sample(*parts, seed=seed))
        return kept

    monkeypatch.setattr("sailfish.compress.distill.make.sample", kept_too)
    out = tmp_path / "out"
    words = f"distill -t {teacher} -s {teacher} -o {out} --data {tokens(tmp_path)} --device cpu --steps 1"
    words += f" --batch 1 --length {LENGTH} --eval-windows 2 --sampled-from-teacher {LENGTH + 1}"
    found = CliRunner().invoke(application(words.split()), words.split(), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert "expected acceptance" in found.output and f"wrote {out}" in found.output
    report = msgspec.json.decode((out / "distillation.json").read_bytes(), type=Report)
    assert (report.n_sampled, report.n_windows) == (2, 3)
    assert kept[0][:16] == kept[1][:16] and kept[0] != kept[1]
    assert "expected acceptance" in (out / "distillation.html").read_text(encoding="utf-8")


def test_every_window_is_read_once_before_one_is_read_again() -> None:
    """In another order the next time, and in the same one for a seed."""
    schedule = msgspec.structs.replace(SCHEDULE, batch=3)
    read = [n for step in range(8) for n in schedule.windows_at(step, 12)]
    assert sorted(read[:12]) == sorted(read[12:]) == list(range(12))
    assert read[:12] != read[12:]
    assert read == [n for step in range(8) for n in schedule.windows_at(step, 12)]


def test_what_cannot_be_distilled_is_refused_in_words(teacher: Path, tmp_path: Path) -> None:
    """Before anything is trained."""
    text = tokens(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    values = json.loads((other / "tokenizer.json").read_text())
    values["model"]["vocab"]["a"], values["model"]["vocab"]["b"] = (
        values["model"]["vocab"]["b"],
        values["model"]["vocab"]["a"],
    )
    (other / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match="different tokenizers"):
        distill(asked(teacher, other, text), tmp_path / "out", silent)
    with pytest.raises(ConfigError, match="longer than a context of 512"):
        long = msgspec.structs.replace(SCHEDULE, length=513)
        distill(asked(teacher, teacher, text, long), tmp_path / "out", silent)
    with pytest.raises(ConfigError, match="writes nothing on windows of 16"):
        short = msgspec.structs.replace(SCHEDULE, length=16)
        distill(replace(asked(teacher, teacher, text, short), n_sampled=1), tmp_path / "out", silent)
    with pytest.raises(ConfigError, match="lr of 0 is not above 0"):
        msgspec.structs.replace(SCHEDULE, lr=0.0)
    with pytest.raises(ConfigError, match="alpha of nan is no share"):
        msgspec.structs.replace(SCHEDULE, alpha=float("nan"))
    with pytest.raises(ConfigError, match="exists already"):
        distill(asked(teacher, teacher, text), tmp_path, silent)
    with pytest.raises(BuildError, match="diverged at step"):
        hot = msgspec.structs.replace(SCHEDULE, lr=1e30, steps=20)
        distill(asked(teacher, teacher, text, hot), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(teacher: Path, tmp_path: Path) -> None:
    """Sharded by torchrun: the same losses, and the same weights but for the order of sums."""
    student, text = pruned_child(teacher, tmp_path / "child"), tokens(tmp_path)
    report, alone = made(asked(teacher, student, text), tmp_path / "alone")
    # As a person would, so that the command line is tested with it.
    command = f"-m torch.distributed.run --nproc-per-node 2 -m sailfish.cli.main distill -t {teacher}"
    command += f" -s {student} -o {tmp_path / 'both'} --data {text} --steps {SCHEDULE.steps} --batch 2"
    command += f" --length {LENGTH} --lr {SCHEDULE.lr} --eval-windows {N_HELD} --device cpu --json"
    done = subprocess.run([sys.executable, *command.split()], check=True, capture_output=True, timeout=600)
    both = msgspec.json.decode((tmp_path / "both" / "distillation.json").read_bytes(), type=Report)
    assert both.n_processes == 2
    assert msgspec.json.decode(done.stdout, type=Report) == both  # which one process prints
    for one, other in zip(report.curve, both.curve, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
    for name, weight in weights(tmp_path / "both").items():
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=1e-5)
