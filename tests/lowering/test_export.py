"""export_onnx and what it writes: files, external data, atomicity, the check hook."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from fxquant.errors import ExportError
from fxquant.graph.program import Program
from fxquant.lowering import saving
from fxquant.lowering.export import check_model, export_onnx
from fxquant.lowering.lower import lower
from fxquant.numerics.runtime import open_session
from fxquant.ops.base import OpDef, Role, Writer, table_of
from tests.lowering.programs import Residual, float_program, image, residual_program

ROOT = Path(__file__).parents[2]


def big_program() -> Program:
    """A float Residual whose second convolution is above the size that goes to external data."""
    torch.manual_seed(0)
    return float_program(Residual(32), image())


def files(folder: Path) -> list[str]:
    """Names of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_file_computes_what_the_program_computes_when_exported(tmp_path: Path) -> None:
    program = residual_program()
    path = export_onnx(program, tmp_path / "new" / "model.onnx", opset=17)
    assert files(path.parent) == ["model.onnx"]
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    assert {item.key: item.value for item in proto.metadata_props}["fxquant.fingerprint"] == program.fingerprint()
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [17]
    x = image(3)
    (actual,) = open_session(path).run({"x": x.numpy()}).values()
    np.testing.assert_allclose(actual, program.module(x).detach().numpy(), atol=0.02)


def test_data_goes_to_a_file_of_its_own_when_asked(tmp_path: Path) -> None:
    program, x = big_program(), image(3)
    path = export_onnx(program, tmp_path / "model.onnx", external_data=True)
    (data,) = saving.external_files(path)
    assert files(tmp_path) == ["model.onnx", data]
    onnx.checker.check_model(str(path), full_check=True)
    (actual,) = open_session(path).run({"x": x.numpy()}).values()
    np.testing.assert_allclose(actual, program.module(x).detach().numpy(), atol=1e-5)
    export_onnx(program, path, external_data=True)
    assert files(tmp_path) == ["model.onnx", data]
    with torch.no_grad():
        program.module.get_parameter("conv2.weight").add_(1.0)
    export_onnx(program, path, external_data=True)
    assert len(files(tmp_path)) == 2 and data not in files(tmp_path)
    (actual,) = open_session(path).run({"x": x.numpy()}).values()
    np.testing.assert_allclose(actual, program.module(x).detach().numpy(), rtol=1e-4, atol=1e-4)
    export_onnx(program, path)
    assert files(tmp_path) == ["model.onnx"]


def test_data_goes_to_a_file_of_its_own_when_a_protobuf_cannot_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LARGEST_PROTOBUF", 10_000)
    path = export_onnx(big_program(), tmp_path / "model.onnx")
    assert len(files(tmp_path)) == 2 and saving.external_files(path)


def test_model_is_whole_in_memory_when_saved_with_external_data(tmp_path: Path) -> None:
    model = lower(big_program())
    saving.save(model, tmp_path / "model.onnx", external=True)
    assert not any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that lies in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _failing(real: Any, at: int, fault: BaseException) -> Any:
    """`real`, raising `fault` at its call number `at`."""
    calls = iter(range(1, 100))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise fault
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize(
    ("external", "function", "at"),
    [(False, "fsync", 1), (False, "link", 1), (False, "replace", 1)]
    + [(True, function, at) for function in ("fsync", "link", "replace") for at in (1, 2)],
)
def test_old_file_stays_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, function: str, at: int, fault: BaseException
) -> None:
    path = export_onnx(big_program(), tmp_path / "model.onnx", external_data=external)
    before = contents(tmp_path)
    changed = big_program()
    with torch.no_grad():
        changed.module.get_parameter("conv2.weight").add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, _failing(getattr(os, function), at, fault))
        is_full = isinstance(fault, OSError)
        with pytest.raises((ExportError, KeyboardInterrupt), match="No space left on device" if is_full else "stop"):
            export_onnx(changed, path, external_data=external)
    assert contents(tmp_path) == before
    export_onnx(changed, path, external_data=external)
    assert contents(tmp_path) != before and len(contents(tmp_path)) == len(before)


def test_new_file_is_whole_when_interrupted_after_it_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace_and_stop(source: Any, target: Any) -> None:
        real(source, target)
        if str(target).endswith(".onnx"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_stop)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(big_program(), tmp_path / "model.onnx", external_data=True)
    open_session(tmp_path / "model.onnx").run({"x": image().numpy()})
    assert len(files(tmp_path)) == 2


@pytest.mark.slow
def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path) -> None:
    script = f"""
        import resource, signal
        from pathlib import Path
        from fxquant.errors import ExportError
        from fxquant.lowering.export import export_onnx
        from tests.lowering.test_export import big_program
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for external in (False, True):
            try:
                export_onnx(big_program(), {str(tmp_path / "model.onnx")!r}, external_data=external)
            except ExportError as err:
                print(err)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("cannot be written; got File too large") == 2, done.stdout + done.stderr
    assert files(tmp_path) == []


@pytest.mark.slow
def test_nothing_is_left_when_the_process_is_killed_while_it_writes(tmp_path: Path) -> None:
    script = f"""
        import os, time
        from fxquant.lowering.export import export_onnx
        from tests.lowering.test_export import big_program
        def wait(descriptor):
            print("writing", flush=True)
            time.sleep(60)
        os.fsync = wait
        export_onnx(big_program(), {str(tmp_path / "model.onnx")!r}, external_data=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "writing\n"
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=10)
    time.sleep(0.1)
    assert files(tmp_path) == []


def test_export_works_when_the_file_system_has_no_unnamed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", without)
    export_onnx(big_program(), tmp_path / "model.onnx", external_data=True)
    assert len(files(tmp_path)) == 2
    before = files(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ExportError, match="Input/output error"):
        export_onnx(residual_program(), tmp_path / "model.onnx")
    assert files(tmp_path) == before


def test_permissions_follow_the_umask_when_exported(tmp_path: Path) -> None:
    path = export_onnx(residual_program(), tmp_path / "model.onnx")
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


def test_export_is_refused_when_the_path_is_a_folder_or_below_a_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected a file; got a folder"):
        export_onnx(residual_program(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"folder '.*file' cannot be made"):
        export_onnx(residual_program(), tmp_path / "file" / "model.onnx")


def test_check_hook_prevents_the_export_when_it_raises(tmp_path: Path) -> None:
    seen = []

    def check(model: ir.Model) -> None:
        seen.append(model.graph.name)
        raise ExportError("no kernel for 'linear'")

    with pytest.raises(ExportError, match="no kernel for 'linear'"):
        export_onnx(residual_program(), tmp_path / "model.onnx", check=check)
    assert seen == ["test"] and files(tmp_path) == []


def test_checker_refuses_when_an_emitter_writes_nonsense() -> None:
    model = lower(residual_program())
    next(node for node in model.graph if node.op_type == "Conv").attributes.pop("pads")
    with pytest.raises(ExportError, match=r"onnx\.checker refuses the model; got .*node name: conv2d\)"):
        check_model(model)


def _broken(node: torch.fx.Node, writer: Writer) -> ir.Value:
    raise KeyError("missing")


def test_emitter_fault_names_the_node_when_it_raises() -> None:
    relu = OpDef("relu", (torch.ops.aten.relu.default,), Role.ACTIVATION, _broken)
    with pytest.raises(ExportError, match=r"node 'relu' cannot be written.*KeyError: 'missing'.*emitter"):
        lower(float_program(torch.nn.ReLU(), image()), 21, table_of([(relu,)]))
