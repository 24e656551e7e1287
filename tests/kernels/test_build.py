"""Objects that are found, compiled, tried and kept; machines and directories that do not suit."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import native_kernels as native
import pytest

from converters.gguf.types import BLOCKS, GGMLType
from mlxrun.errors import KernelsError, ParameterError
from mlxrun.kernels import build, machine
from mlxrun.kernels import dispatch as kernels
from mlxrun.kernels.build import BuildError, Compiler, Object
from mlxrun.kernels.cache import ObjectCache, digest, place

ROOT = Path(kernels.__file__).parents[2]
MADE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "cache")


@pytest.fixture
def made(tmp_path: Path) -> Object:
    """Something small to compile."""
    source = tmp_path / "made.cpp"
    source.write_text(f'#include "made.h"\n{MADE}')
    (tmp_path / "made.h").write_text("#define MADE 1\n")
    return Object("made-portable", (source,), ("-shared", "-fPIC"))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "attempt", lambda paths: None)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line into a file for each object that it compiles."""
    log = tmp_path / "compiled"
    log.touch()
    script = tmp_path / "counting-c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-o*) echo "$@" >> {log};; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A compiler that knows its version and runs a shell script."""
    path = tmp_path / "other-c++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


# ---- objects are kept, and only complete ones are used -------------------------------------------


@pytest.mark.usefixtures("untried")
def test_an_object_is_compiled_once(cache: ObjectCache, made: Object, counted: Path) -> None:
    first, compiled = build.build({"made": made}, cache)
    again, none = build.build({"made": made}, cache)
    assert (compiled, none, first) == (["made"], [], again)
    assert lines(counted) == 1
    assert [stat.S_IMODE(path.stat().st_mode) for path in cache.folder.glob("made*")] == [0o600] * 2


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("change", ["source", "header", "flags", "needs", "compiler"])
def test_a_change_makes_it_another_object(
    cache: ObjectCache, made: Object, counted: Path, tmp_path: Path, change: str
) -> None:
    first, _ = build.build({"made": made}, cache)
    if change == "source":
        made.sources[0].write_text(made.sources[0].read_text() + "\n")
    elif change == "header":
        (tmp_path / "made.h").write_text("#define MADE 2\n")
    elif change == "compiler":
        script = tmp_path / "counting-c++"
        script.write_text(script.read_text().replace("exec c++", "exec g++ -DOTHER"))
        script.write_text(
            script.read_text().replace(
                "exec", 'if [ "$1" = --version ]; then echo 2.0; exit; fi\nexec', 1
            )
        )
    else:
        other = {"flags": ("-shared", "-fPIC", "-O1")} if change == "flags" else {"needs": "0.33"}
        made = Object(**{"name": made.name, "sources": made.sources, "flags": made.flags, **other})
    second, _ = build.build({"made": made}, cache)
    assert first != second
    assert lines(counted) == 2


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("damage", ["cut", "altered", "emptied", "removed", "hash altered"])
def test_a_damaged_object_is_compiled_again(
    cache: ObjectCache, made: Object, counted: Path, damage: str
) -> None:
    first, _ = build.build({"made": made}, cache)
    path = first["made"]
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "altered":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "removed":
        path.unlink()
    else:
        path.with_suffix(".sha256").write_text("0" * 64)
    second, compiled = build.build({"made": made}, cache)
    assert compiled == ["made"]
    assert second["made"].stat().st_size == len(whole)
    assert build.build({"made": made}, cache) == (second, [])


@pytest.mark.usefixtures("untried")
def test_without_a_compiler_what_was_compiled_serves(
    cache: ObjectCache, made: Object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, _ = build.build({"made": made}, cache)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.build({"made": made}, cache) == (first, [])
    first["made"].write_bytes(b"")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build.build({"made": made}, cache)


@pytest.mark.usefixtures("untried")
def test_two_that_build_at_once_compile_once(
    cache: ObjectCache, made: Object, counted: Path
) -> None:
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(build.build({"m": made}, cache)[0]["m"]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1
    assert lines(counted) == 1


def test_what_does_not_pass_its_test_is_not_kept(
    cache: ObjectCache, made: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(paths: object) -> None:
        raise BuildError("wrong")

    monkeypatch.setattr(build, "attempt", fail)
    with pytest.raises(BuildError, match="wrong"):
        build.build({"made": made}, cache)
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]


@pytest.mark.usefixtures("untried")
def test_old_objects_of_the_same_name_go_when_a_new_one_comes(
    cache: ObjectCache, made: Object
) -> None:
    first = build.build({"made": made}, cache)[0]["made"]
    young = build.build({"made": replace(made, needs="1")}, cache)[0]["made"]
    other = build.build({"made": replace(made, name="other")}, cache)[0]["made"]
    for path in (first, other):
        os.utime(path, (0, 0))
    last = build.build({"made": replace(made, needs="2")}, cache)[0]["made"]
    assert set(cache.folder.glob("*.so")) == {young, other, last}
    assert len(list(cache.folder.glob("*.sha256"))) == 3


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Object) -> Path:
    """A wheel's package that has an object."""
    folder = tmp_path / "site" / "mlxrun_kernels"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    subprocess.run(made.command(["c++"], folder / f"{made.name}.so"), check=True)
    entry = {"key": made.key, "sha256": digest(folder / f"{made.name}.so")}
    (folder / "manifest.json").write_text(json.dumps({"objects": {made.name: entry}}))
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "mlxrun_kernels", raising=False)
    build.shipped.cache_clear()
    return folder


@pytest.fixture(autouse=True)
def _other_wheels() -> Iterator[None]:
    yield
    build.shipped.cache_clear()
    sys.modules.pop("mlxrun_kernels", None)


@pytest.mark.usefixtures("untried")
def test_an_object_from_a_wheel_needs_no_compiler(
    wheel: Path, made: Object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = build.find({"made": made}, None)
    assert found.paths == {"made": wheel / f"{made.name}.so"}


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("damage", ["altered", "other sources", "no list", "a broken list"])
def test_an_object_from_a_wheel_that_does_not_fit_is_not_used(
    wheel: Path, made: Object, cache: ObjectCache, damage: str
) -> None:
    if damage == "altered":
        (wheel / f"{made.name}.so").write_bytes(b"something else")
    elif damage == "other sources":
        made.sources[0].write_text(made.sources[0].read_text() + "\n")
    elif damage == "no list":
        (wheel / "manifest.json").unlink()
    else:
        (wheel / "manifest.json").write_text("{")
    paths, compiled = build.build({"made": made}, cache)
    assert compiled == ["made"]
    assert paths["made"].parent == cache.folder


# ---- compilers -----------------------------------------------------------------------------------

FAILING = {
    "error": ('echo "In file x" >&2; echo "x.cpp:1: error: no such thing" >&2; exit 1',
              "x.cpp:1: error: no such thing"),
    "full disk": ('echo "/tmp/c.s: No space left on device" >&2; exit 1', "No space left"),
    "silence": ("exit 3", "status 3"),
    "a crash": ("kill -SEGV $$", "SIGSEGV"),
    "no output": ("exit 0", "makes no object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILING)
def test_a_compiler_that_fails(
    cache: ObjectCache, made: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    script, telling = FAILING[kind]
    compiler(tmp_path, monkeypatch, script)
    with pytest.raises(BuildError) as caught:
        build.build({"made": made}, cache)
    assert telling in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.folder.glob("*.so"))


def test_a_compiler_that_hangs_is_ended_with_its_children(
    cache: ObjectCache, made: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    compiler(tmp_path, monkeypatch, f"sleep 1000 & echo $! > {pid}; wait")
    monkeypatch.setattr(build, "COMPILING", 1.0)
    with pytest.raises(BuildError, match="more than 1 s"):
        build.build({"made": made}, cache)
    for _ in range(100):
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{int(pid.read_text())}/stat").read_text().rpartition(")")[2][:3]:
            return  # ended, not yet waited for
        time.sleep(0.1)
    pytest.fail("the compiler's child lives on")


def test_a_compiler_s_name_is_no_shell_s_command(
    cache: ObjectCache, made: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"c++; touch {tmp_path}/touched")
    with pytest.raises(BuildError, match="which is no compiler"):
        build.build({"made": made}, cache)
    assert not (tmp_path / "touched").exists()


# ---- the cache's directory -----------------------------------------------------------------------


def test_the_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        (tmp_path / "private").mkdir(mode=0o700)
        cache = ObjectCache(tmp_path / "private" / "mlxrun")
    finally:
        os.umask(old)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def _open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def _open_parent(folder: Path) -> None:
    folder.parent.chmod(0o777)


def _link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def _file(folder: Path) -> None:
    folder.rmdir()
    folder.touch()


@pytest.mark.parametrize("spoil", [_open_to_all, _open_parent, _link, _file])
def test_a_directory_that_others_could_write_to_is_refused(tmp_path: Path, spoil: object) -> None:
    folder = tmp_path / "parent" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(KernelsError) as caught:
        ObjectCache(folder)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    os.chown(folder, 1234, 1234)
    with pytest.raises(KernelsError, match="another user"):
        ObjectCache(folder)
    os.chown(folder, 0, 0)
    os.chown(tmp_path, 1234, 0)
    with pytest.raises(KernelsError, match="another user"):
        ObjectCache(folder)


def test_a_shared_parent_with_the_sticky_bit_serves(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    assert ObjectCache(tmp_path / "cache").folder.is_dir()


def test_where_the_directory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert place() == Path("/var/caches/mlxrun/kernels")
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert place() == Path("/home/somebody/.cache/mlxrun/kernels")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert place() == Path("/home/somebody/Library/Caches/mlxrun/kernels")


# ---- the whole, each in a process of its own -----------------------------------------------------

ASK = """
import json, sys
from converters.gguf.types import GGMLType
from mlxrun.kernels import dispatch as kernels
from mlxrun.errors import MlxrunError
said = []
try:
    found = kernels.available({GGMLType.F32, GGMLType[sys.argv[1]]}, said.append)
    reason = getattr(found, "reason", None)
    again = getattr(kernels.available({GGMLType.F32, GGMLType[sys.argv[1]]}), "reason", None)
    assert again == reason
except MlxrunError as error:
    reason = f"{type(error).__name__}: {error}"
print(json.dumps({"said": said, "reason": reason}))
"""


def ask(kind: str = "F16", **environment: str) -> tuple[str | None, list[str]]:
    """Why kernels are missing in a new process, if they are, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, kind],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["reason"], found["said"]


def test_kernels_are_compiled_in_a_new_home_and_found_again(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    reason, said = ask(**home)
    assert reason is None
    assert len(said) == 1
    assert " s" in said[0]
    assert ask(**home) == (None, [])
    reason, said = ask("Q8_0", **home)
    assert reason is None
    assert "Q8_0" in said[0]
    assert "F16" not in said[0]


@pytest.mark.parametrize("name", ["portable", machine.runnable_isas()[0].name])
def test_instructions_that_the_user_chooses(name: str) -> None:
    assert ask(MLXRUN_KERNELS=name)[0] is None


def test_kernels_switched_off() -> None:
    assert ask(MLXRUN_KERNELS="0")[0] == "switched off by MLXRUN_KERNELS=0"


@pytest.mark.parametrize("name", ["neon" if machine.machine() == "x86_64" else "avx2", "fastest"])
def test_instructions_that_this_machine_lacks_are_refused(name: str) -> None:
    reason, _ = ask(MLXRUN_KERNELS=name)
    assert reason is not None
    assert reason.startswith("KernelsError")
    assert "portable" in reason


@pytest.mark.parametrize("count", ["0", "-1", "many", "4.5", "99999999999"])
def test_numbers_of_threads_that_are_none(count: str) -> None:
    reason, _ = ask(MLXRUN_THREADS=count)
    assert reason is not None
    assert reason.startswith("ParameterError")


def test_types_without_kernels() -> None:
    reason, _ = ask("F64")
    assert reason == "there are no kernels for F64"


def test_all_types_that_can_be_weights_have_kernels() -> None:
    isa = machine.chosen_isa()
    assert set(build.objects(frozenset(BLOCKS) - build.UNKNOWN, isa)) > {"Q4_K", "TQ1_0", "BF16"}


def unwritable(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").touch()
    return {"XDG_CACHE_HOME": str(tmp_path / "file")}


def no_compiler(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path), "CXX": ""}


def crashing(tmp_path: Path) -> dict[str, str]:
    """A compiler whose objects crash when they are loaded."""
    (tmp_path / "crash.cpp").write_text(
        "#include <cstdlib>\n__attribute__((constructor)) static void crash() { std::abort(); }\n"
    )
    script = tmp_path / "crashing-c++"
    script.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\n'
        f'for out; do :; done\nexec c++ -shared -fPIC {tmp_path}/crash.cpp -o "$out"\n'
    )
    script.chmod(0o755)
    return {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(script)}


def wrong(tmp_path: Path) -> dict[str, str]:
    """A compiler that takes one type for another; it has compiled everything before."""
    names = {"core.cpp": "core", "glue.cpp": "glue", "TYPE=F32": "F32", "TYPE=F16": "BF16"}
    paths = native.compiled(machine.chosen_isa().name, ("F32", "BF16"))
    cases = "".join(f'*{part}*) made="{paths[name]}";;\n' for part, name in names.items())
    script = tmp_path / "wrong-c++"
    script.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\n'
        f'case "$*" in\n{cases}esac\nfor out; do :; done\nexec cp "$made" "$out"\n'
    )
    script.chmod(0o755)
    return {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(script)}


@pytest.mark.parametrize(
    ("spoil", "telling"),
    [
        (unwritable, "file"),
        (no_compiler, "no C++ compiler"),
        (crashing, "SIGABRT"),
        (wrong, "do not pass their test"),
    ],
)
def test_why_kernels_are_missing_in_one_line(tmp_path: Path, spoil: object, telling: str) -> None:
    tmp_path.chmod(0o700)
    assert callable(spoil)
    reason, said = ask(**spoil(tmp_path))
    assert reason is not None
    assert telling in reason
    assert "\n" not in reason
    assert not said


def test_status_says_where_objects_are() -> None:
    assert ask("Q8_0")[0] is None
    status = kernels.status({GGMLType.Q8_0, GGMLType.F64})
    assert status.isa in status.runnable
    assert status.runnable[-1] == "portable"
    assert status.objects["Q8_0"] in ("cached", "shipped")
    assert "F64" not in status.objects
    assert status.threads >= 1
    assert status.compiler


# ---- the processor -------------------------------------------------------------------------------

X86 = "processor : 0\nflags\t\t: fpu sse2 avx2 fma f16c bmi2 {}\n"
ARM = "processor : 0\nFeatures\t: fp asimd asimdhp {}\n"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("x86_64", X86.format(""), ["avx2", "portable"]),
        ("x86_64", X86.format("avx512f avx512bw avx512vl avx512dq"), ["avx2", "portable"]),
        (
            "x86_64",
            X86.format("avx512f avx512bw avx512vl avx512dq avx512_vnni"),
            ["avx512", "avx2", "portable"],
        ),
        ("x86_64", "", ["portable"]),
        ("arm64", ARM.format("asimddp"), ["neon", "portable"]),
        ("arm64", ARM.format("asimddp i8mm"), ["i8mm", "neon", "portable"]),
        ("arm64", ARM.format(""), ["portable"]),
        ("riscv64", "", ["portable"]),
    ],
)
def test_instruction_sets(kind: str, text: str, expected: list[str]) -> None:
    found = machine.isas_of(kind, machine.features_in(text))
    assert [isa.name for isa in found] == expected


def test_a_thread_for_each_physical_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.THREADS, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    for cpu in range(8):  # two sockets of two cores of two threads
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu // 4}\n")
        (topology / "core_id").write_text(f"{cpu // 2 % 2}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.thread_count() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    assert machine.thread_count() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 9, 10}, raising=False)
    assert machine.thread_count() == 3
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.thread_count() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.thread_count() == 3
    monkeypatch.setenv(machine.THREADS, "7")
    assert machine.thread_count() == 7
    monkeypatch.setenv(machine.THREADS, "seven")
    with pytest.raises(ParameterError):
        machine.thread_count()


def test_the_command_names_all_that_the_key_has(tmp_path: Path) -> None:
    isa = machine.chosen_isa()
    made = build.format_of(GGMLType.Q4_K, isa)
    command = made.command(("c++", "-pipe"), tmp_path / "x.so")
    assert command[:2] == ["c++", "-pipe"]
    assert {*made.flags, "-DKERNELS_TYPE=Q4_K", *isa.flags} <= set(command)
    assert command[-2:] == ["-o", str(tmp_path / "x.so")]
    assert isinstance(Compiler.find(), Compiler)
