"""Compiling the CPU kernel: once, whole or not at all, and every way it can fail says why."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time

import pytest

from phatgoose.errors import RoutingError, StorageError
from phatgoose.ops import BACKENDS, auto_is, backend
from phatgoose.ops.cpu import build


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing remembered by this process, now or afterwards."""
    compiled = build.library().path.read_bytes()
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path))
    build.library.cache_clear()
    build.reason.cache_clear()
    yield compiled
    build.library.cache_clear()
    build.reason.cache_clear()


def compiler(folder, text):
    """A C++ compiler of our own."""
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_it_is_compiled_once_and_then_found(fresh, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(build, "_compiled", lambda: calls.append(1) or fresh)
    first = build.library()
    assert first.path.parent == tmp_path / "kernels"
    assert first.variants[-1] == "portable"
    build.library.cache_clear()
    monkeypatch.setenv("PATH", "")  # no compiler is needed any more
    assert build.library().path == first.path
    assert calls == [1]
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


def test_the_name_depends_on_source_flags_compiler_and_torch(monkeypatch, tmp_path):
    names = {build.kernel_path().name}
    with monkeypatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
        names.add(build.kernel_path().name)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "another")
        names.add(build.kernel_path().name)
    with monkeypatch.context() as patch:
        patch.setattr(build.torch, "__version__", "9.9")
        names.add(build.kernel_path().name)
    with monkeypatch.context() as patch:
        for source in build.SOURCES.iterdir():
            if source.is_file():
                (tmp_path / source.name).write_text(source.read_text() + "\n")
        patch.setattr(build, "SOURCES", tmp_path)
        names.add(build.kernel_path().name)
    assert len(names) == 5
    assert all(re.fullmatch(r"phatgoose-[0-9a-f]{16}\.so", name) for name in names)


def test_without_a_compiler_auto_is_torch_and_cpu_is_refused(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend("auto") is BACKENDS["torch"]
    kind, why = auto_is()
    assert kind == "torch"
    assert "no C++ compiler was found (looked for $CXX, g++, c++, clang++)" in why
    with pytest.raises(RoutingError, match="no C\\+\\+ compiler"):
        backend("cpu")
    assert backend("torch").name == "torch"


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo "update.cpp:1: something is wrong" >&2; exit 1'))
    with pytest.raises(RoutingError, match=r"cxx failed: update\.cpp:1: something is wrong"):
        build.library()
    assert not (tmp_path / "kernels").exists()
    assert auto_is()[0] == "torch"


def test_what_a_compiler_says_may_be_in_any_encoding(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path, "printf 'na\\357ve: \\377' >&2; exit 1"))
    assert "cxx failed: na" in auto_is()[1]


def ended(pid):
    """Whether a process is gone, or waits for nobody but to be counted out."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(") ", 1)[1].startswith("Z")
    except FileNotFoundError:
        return True


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path, f"sleep 100 & echo $! $$ >> {tmp_path}/pids; wait"))
    monkeypatch.setattr(build, "SECONDS", 1)
    kind, why = auto_is()
    assert kind == "torch"
    assert "cxx was not done after 1 seconds" in why
    pids = (tmp_path / "pids").read_text().split()
    assert pids
    for _ in range(100):
        if all(map(ended, pids)):
            break
        time.sleep(0.05)
    assert all(map(ended, pids))


def test_the_compiler_may_be_several_words(fresh, monkeypatch, tmp_path):
    path = compiler(tmp_path, 'echo "called with $1" >&2; exit 1')
    monkeypatch.setenv("CXX", f"'{path}' -m64")
    assert build.compiler() == (path, "-m64")
    assert "cxx -m64 failed: called with -m64" in auto_is()[1]
    folder = tmp_path / "my tools"
    folder.mkdir()
    for text in (compiler(folder, ""), f"'{folder}/cxx'"):
        monkeypatch.setenv("CXX", text)
        assert build.compiler() == (f"{folder}/cxx",)


@pytest.mark.parametrize("text", ["/nonexistent", "g++ '", " "])
def test_a_compiler_that_isn_t_there_is_named(fresh, monkeypatch, text):
    monkeypatch.setenv("CXX", text)
    assert build.compiler() == ()
    assert f"no C++ compiler was found ($CXX is {text!r})" in auto_is()[1]


def test_what_can_t_be_loaded_is_not_kept(fresh, monkeypatch, tmp_path):
    """As clang++'s, whose OpenMP calls torch's library may not have."""
    real = shlex.join(build.compiler())
    unknown = 'extern "C" void __kmpc_fork_call(); extern "C" void go() { __kmpc_fork_call(); }'
    link = f"echo '{unknown}' | exec {real} -shared -fPIC -x c++ - -o \"$last\""
    text = f'for last; do :; done\ncase "$*" in *-shared*) {link};; *) exec touch "$last";; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path, text))
    with pytest.raises(RoutingError, match=r"compiled can't be loaded: .*__kmpc_fork_call.*Install g\+\+"):
        build.library()
    assert not (tmp_path / "kernels").exists()


def test_what_can_t_be_loaded_any_more_is_compiled_again(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_compiled", lambda: fresh)
    path = build.kernel_path()
    assert path.parent == tmp_path / "kernels"
    path.parent.mkdir()
    path.write_bytes(b"of a system that is no more")
    assert build.library().path == path
    assert path.read_bytes() == fresh


def test_variants_that_the_compiler_doesn_t_know_are_left_out(fresh, monkeypatch, tmp_path):
    real = shlex.join(build.compiler())
    picky = 'for a in "$@"; do case "$a" in -mavx*) echo unknown option >&2; exit 1;; esac; done\n'
    monkeypatch.setenv("CXX", compiler(tmp_path, picky + f'exec {real} "$@"'))
    monkeypatch.setattr(build, "FLAGS", tuple(f for f in build.FLAGS if f != "-O3"))
    assert build.library().variants == ("portable",)


def shared(path):
    """Functions and data of which the linker keeps one, whichever objects define them."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm here, which lists a file's symbols")
    listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if re.match(r"[0-9a-f]+ [WVuC] ", line)]


@pytest.mark.parametrize("name", build.VARIANTS)
def test_instruction_sets_share_no_symbol(name, tmp_path):
    """One that AVX-512's object defines would be run by plain processors. Without optimisation nothing
    is inlined: the hardest case."""
    options = [flag for flag in build.FLAGS if flag != "-O3"] + [f"-DVARIANT={name}", *build.VARIANTS[name]]
    command = [
        *build.compiler(),
        *options,
        "-O0",
        "-c",
        build.SOURCES / "update.cpp",
        "-o",
        tmp_path / "it.o",
    ]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"this compiler can't: {done.stderr[-300:]}")
    assert shared(tmp_path / "it.o") == []


def test_the_library_has_no_symbol_that_several_objects_defined():
    assert shared(build.library().path) == []


def test_the_portable_object_is_linked_before_all_others(fresh, monkeypatch, tmp_path):
    real, log = shlex.join(build.compiler()), tmp_path / "log"
    monkeypatch.setenv("CXX", compiler(tmp_path, f'echo "$@" >> {log}\nexec {real} "$@"'))
    monkeypatch.setattr(build, "FLAGS", (*(f for f in build.FLAGS if f != "-O3"), "-O0"))
    variants = build.library().variants
    objects = re.findall(r"(\w+)\.o\b", log.read_text().splitlines()[-1])
    assert objects[:2] == ["dispatch", "portable"]
    assert set(variants) < set(objects)


def test_a_file_that_is_no_library_is_an_error(fresh, monkeypatch):
    monkeypatch.setattr(build, "_compiled", lambda: b"not a library")
    with pytest.raises(RoutingError, match="can't be used"):
        build.library()


def test_a_cache_that_can_t_be_written(fresh, monkeypatch):
    def full(path, data):
        raise StorageError("no space left to write it.")

    monkeypatch.setattr(build, "_compiled", lambda: fresh)
    monkeypatch.setattr(build, "write_bytes", full)
    with pytest.raises(RoutingError, match="no space left"):
        build.library()


def test_it_shares_torchs_threads():
    """A second OpenMP library would bring threads of its own, which fight torch's for the same cores."""
    code = (
        "import os, torch\nfrom phatgoose.ops.cpu import build\nbuild.library()\n"
        "torch.ones(1000, 1000) @ torch.ones(1000, 1000)\n"
        "files = {l.split(maxsplit=5)[5].strip() for l in open('/proc/self/maps') if 'omp' in l and '/' in l}\n"
        "print(*{os.path.realpath(f) for f in files "
        "if os.path.basename(f).startswith(('libgomp', 'libiomp', 'libomp'))})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert len(done.stdout.split()) == 1


def test_processes_may_compile_at_once(fresh, tmp_path):
    """Each writes the whole file and puts it in place in one step."""
    (tmp_path / "compiled").write_bytes(fresh)
    code = (
        "import pathlib\nfrom phatgoose.ops.cpu import build\n"
        f"build._compiled = lambda: pathlib.Path({str(tmp_path / 'compiled')!r}).read_bytes()\n"
        "print(build.library().path)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0] * 2
    assert len(paths) == 1
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_the_openmp_library_is_torchs_whoever_else_brings_one(monkeypatch, tmp_path):
    root = os.path.dirname(build.torch.__file__)
    others = [
        "/a/scikit_learn.libs/libgomp-e9.so.1.0.0",
        "/z/libiomp5.so",
        "/a/sentencepiece.libs/libgomp-6a.so.1",
    ]

    def loaded(*files):
        maps = tmp_path / "maps"
        maps.write_text("".join(f"7f00-7f01 r-xp 00000000 fe:00 12 {f}\n" for f in files))
        monkeypatch.setattr("builtins.open", lambda *_, **__: maps.open(encoding="utf-8"))
        found = build._openmp()
        monkeypatch.undo()
        return found

    assert loaded(*others, f"{root}/lib/libgomp.so.1") == f"{root}/lib/libgomp.so.1"
    assert loaded(*others) == "/z/libiomp5.so"
    assert loaded(others[0]) == others[0]
    assert loaded("/lib/libc.so.6") is None
