import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.__main__ import main
from falcon_jax.native import library


def test_is_built_where_the_cache_is(built, monkeypatch, tmp_path):
    assert fj.native.is_built() and library.load()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not fj.native.is_built() and not library.load()


def test_asked_for_and_not_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = fj.models.vgg8_cifar(width=0.125, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="python -m falcon_jax build"):
        fj.deploy(model, native=True)


def test_no_compiler_is_told_in_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["build", "--compiler", "no-such-compiler"]) == 2
    assert "no C++ compiler was found; looked for no-such-compiler" in capsys.readouterr().err


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(ValueError, match="out of luck"):
        fj.native.build(compiler=str(compiler))
    assert not fj.native.is_built()
    assert not list((tmp_path / "cache" / "falcon_jax").iterdir())


def test_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = library.library_path()
    path.parent.mkdir(parents=True)
    path.write_text("no library")
    with pytest.raises(ValueError, match="cannot be loaded"):
        library.load()
