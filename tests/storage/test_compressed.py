import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.linen_networks import NETWORKS, Compact, drawn, inputs
from tests.compression.networks import Nested, Scanned, Small, arrays, images, randomised

RULES = [fj.Rule(method=fj.Falcon())]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = randomised(Small(nnx.Rngs(0)))
    plan = fj.make_plan(model, RULES, images())
    small = fj.compress(model, plan)
    path = tmp_path_factory.mktemp("saved") / "model"
    fj.save_compressed(path, small, plan)
    return path, small, plan


def assert_same(loaded, expected):
    old, new = arrays(expected), arrays(loaded)
    random = [name for name in old if "/rngs/" in f"/{name}/" or name.endswith("count")]
    assert old.keys() == new.keys()
    for name in old.keys() - set(random):
        assert old[name].dtype == new[name].dtype
        np.testing.assert_array_equal(old[name], new[name])


@pytest.mark.parametrize("network", [Small, Nested, Scanned])
def test_nnx_there_and_back(network, tmp_path):
    model = randomised(network(nnx.Rngs(0)))
    plan = fj.make_plan(model, RULES, images())
    small = fj.compress(model, plan)
    fj.save_compressed(tmp_path / "model", small, plan)
    loaded = fj.load_compressed(tmp_path / "model", lambda: network(nnx.Rngs(7)))
    assert_same(loaded, small)
    loaded.eval()
    np.testing.assert_array_equal(loaded(images()), small(images()))


class Two(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Conv(3, 3, (3, 3), rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.b(self.a(x))


def test_the_builder_may_make_shapes(saved, tmp_path):
    model = Two(nnx.Rngs(0))
    plan = fj.make_plan(model, RULES, images())
    small = fj.compress(model, plan)
    fj.save_compressed(tmp_path / "model", small, plan)
    loaded = fj.load_compressed(
        tmp_path / "model", lambda: nnx.eval_shape(lambda: Two(nnx.Rngs(1)))
    )
    assert_same(loaded, small)
    np.testing.assert_array_equal(loaded(images()), small(images()))
    with pytest.raises(ValueError, match="random stream at 'dropout/rngs/count' is not in"):
        fj.load_compressed(saved[0], lambda: nnx.eval_shape(lambda: Small(nnx.Rngs(0))))


@pytest.mark.parametrize("name", NETWORKS)
def test_linen_there_and_back(name, tmp_path):
    module = NETWORKS[name]()
    variables = drawn(module)
    plan = fj.make_plan(module.bind(variables), RULES, inputs())
    small, compressed = fj.compress(module.bind(variables), plan).unbind()
    fj.save_compressed(tmp_path / "model", small.bind(compressed), plan)
    loaded, found = fj.load_compressed(tmp_path / "model", NETWORKS[name]).unbind()
    jax.tree.map(np.testing.assert_array_equal, found, compressed)
    x = inputs().args[0]
    np.testing.assert_array_equal(
        loaded.apply(found, x, train=False), small.apply(compressed, x, train=False)
    )


def test_half_precision(tmp_path):
    model = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    plan = fj.make_plan(model, RULES)
    small = fj.compress(model, plan)
    fj.save_compressed(tmp_path / "model", small, plan)
    build = functools.partial(nnx.Conv, 3, 4, (3, 3), param_dtype=jnp.bfloat16)
    assert_same(fj.load_compressed(tmp_path / "model", lambda: build(rngs=nnx.Rngs(1))), small)


def test_what_differs_from_the_builder_is_said(saved):
    path, _, _ = saved
    with pytest.raises(ValueError, match=r"'conv1' is ConvSpec.*but it is"):
        fj.load_compressed(path, lambda: Small(nnx.Rngs(0), m=5))
    with pytest.raises(ValueError, match="replaces 'conv1', but the model has no such"):
        fj.load_compressed(path, lambda: Scanned(nnx.Rngs(0)))

    def other_head():
        model = Small(nnx.Rngs(0))
        model.head = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        model.extra = nnx.Param(jnp.ones(3))
        del model.norm2
        return model

    with pytest.raises(ValueError, match="does not fit what build_model makes") as caught:
        fj.load_compressed(path, other_head)
    message = str(caught.value)
    assert "extra is missing" in message
    assert "norm2/scale is not expected" in message
    assert "head/kernel has shape (4, 5) instead of (4, 6)" in message


def test_what_differs_from_the_linen_builder_is_said(tmp_path):
    variables = drawn(Compact())
    plan = fj.make_plan(Compact().bind(variables), RULES, inputs())
    fj.save_compressed(tmp_path / "model", fj.compress(Compact().bind(variables), plan), plan)
    with pytest.raises(ValueError, match="the model has no such convolution"):
        fj.load_compressed(tmp_path / "model", NETWORKS["setup"])


def test_only_what_the_plan_makes_is_saved(saved, tmp_path):
    _, _, plan = saved
    with pytest.raises(ValueError, match="the model has not got it there"):
        fj.save_compressed(tmp_path / "model", Small(nnx.Rngs(0)), plan)
    module = Compact()
    variables = drawn(module)
    linen_plan = fj.make_plan(module.bind(variables), RULES, inputs())
    with pytest.raises(ValueError, match=r"give module\.bind\(variables\)"):
        fj.save_compressed(tmp_path / "model", module, linen_plan)
    with pytest.raises(ValueError, match="the model has not got it there"):
        fj.save_compressed(tmp_path / "model", module.bind(variables), linen_plan)
    assert not (tmp_path / "model").exists()


def test_a_directory_is_replaced_only_on_request(saved, tmp_path):
    _, small, plan = saved
    fj.save_compressed(tmp_path / "model", small, plan)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fj.save_compressed(tmp_path / "model", small, plan)
    fj.save_compressed(tmp_path / "model", small, plan, overwrite=True)
    assert_same(fj.load_compressed(tmp_path / "model", lambda: Small(nnx.Rngs(1))), small)


def test_what_is_no_saved_model_is_not_replaced(saved, tmp_path):
    source, small, plan = saved
    unfinished = tmp_path / "model.unfinished"
    unfinished.mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    shutil.copytree(source, tmp_path / "more")
    (tmp_path / "more" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("elsewhere")
    for name, words in (("notes", "holds a.txt"), ("more", "holds a.txt"), ("file", "is a file")):
        with pytest.raises(FileExistsError, match=words):
            fj.save_compressed(tmp_path / name, small, plan, overwrite=True)
    fj.save_compressed(tmp_path / "link", small, plan)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "manifest.json").is_file()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.unfinished", "notes", "more", "file", "link", "elsewhere"}


def test_a_model_is_found_where_a_killed_process_had_moved_it(saved, tmp_path):
    """Between the two moves neither the old nor the new one stands at its place."""
    _, small, plan = saved
    work = tmp_path / ".killed.falcon-jax-saving"
    work.mkdir()
    (work / "lock").write_text('{"of": "model"}')
    shutil.copytree(saved[0], work / "old")
    assert_same(fj.load_compressed(tmp_path / "model", lambda: Small(nnx.Rngs(1))), small)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fj.save_compressed(tmp_path / "model", small, plan)


def test_no_directory_and_a_foreign_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        fj.load_compressed(tmp_path / "none", lambda: Small(nnx.Rngs(0)))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no compressed model"):
        fj.load_compressed(tmp_path / "foreign", lambda: Small(nnx.Rngs(0)))


def test_a_plan_changed_by_hand_is_refused(saved, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(saved[0], path)
    file = path / "plan" / "metadata"
    data = json.loads(file.read_text())
    data["plan"]["rows"][0]["spec"]["strides"] = [2, 2]
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="damaged: plan/metadata is not what was saved"):
        fj.load_compressed(path, lambda: Small(nnx.Rngs(0)))


def test_flipped_bytes_are_refused(saved, tmp_path):
    """A byte of any file flipped: the file is named."""
    path, _, _ = saved
    files = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    rng = np.random.default_rng(0)
    for trial, file in enumerate(files):
        copy = tmp_path / str(trial)
        shutil.copytree(path, copy)
        content = bytearray((copy / file).read_bytes())
        if not content:
            continue
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        (copy / file).write_bytes(bytes(content))
        with pytest.raises(ValueError, match=f"damaged: {file} is not what was saved"):
            fj.load_compressed(copy, lambda: Small(nnx.Rngs(1)))


def test_a_missing_file_is_named(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "model")
    (tmp_path / "model" / "arrays" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="damaged: arrays/_METADATA is missing"):
        fj.load_compressed(tmp_path / "model", lambda: Small(nnx.Rngs(1)))
