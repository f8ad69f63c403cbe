"""Checkpoints as people have them: what stands beside the weights, their names, their wrappers."""

import itertools
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import falcon_jax as fj
from falcon_jax.convert import torch_pickle
from tests.convert.archives import (
    dictionary,
    integer,
    pickle_of,
    tensor,
    text,
    write_archive,
    write_legacy,
)
from tests.convert.test_torch_file import SIX, refused

MATRIX = tensor("0", 6, (2, 3), (3, 1))
STATE = dictionary({"fc.weight": MATRIX})
STORAGES = {"0": SIX.tobytes()}


def call(name, *arguments):
    return f"c{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def old(value):
    """A byte string of Python 2."""
    return b"U" + bytes([len(value)]) + value.encode()


def written(tmp_path, items):
    content = dictionary(items) if isinstance(items, dict) else items
    return write_archive(tmp_path / "a.pth", pickle_of(content), STORAGES)


def assert_read(path, names=("fc.weight",), **options):
    named = fj.convert.load_torch(path, **options)
    assert list(named) == list(names)
    for array in named.values():
        np.testing.assert_array_equal(array, SIX.reshape(2, 3))


def test_tensors_of_four_arguments_in_the_old_stream(tmp_path):
    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("7") + text("cpu")
    place = integer(0) + b"(" + integer(2) + integer(3) + b"t(" + integer(3) + integer(1) + b"t"
    made = b"ctorch._utils\n_rebuild_tensor\n(" + reference + integer(6) + b"NtQ" + place + b"tR"
    path = tmp_path / "a.pth"
    write_legacy(path, dictionary({"fc.weight": made}), {"7": (6, SIX.tobytes())})
    assert_read(path)


def test_python_2_wrote_byte_strings_and_pairs(tmp_path):
    reference = b"(" + old("storage") + b"ctorch\nFloatStorage\n" + old("0") + old("cuda:0")
    place = integer(0) + b"(" + integer(2) + integer(3) + b"t(" + integer(3) + integer(1) + b"t"
    made = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + reference
        + integer(6)
        + b"NtQ"
        + place
        + b"\x89NtR"
    )
    ordered = b"ccollections\nOrderedDict\n](](" + old("fc.weight") + made + b"ee\x85R"
    content = b"}(" + old("epoch") + integer(9) + old("state_dict") + ordered + b"u"
    path = tmp_path / "a.pth"
    write_legacy(path, content, {"0": (6, SIX.tobytes())})
    assert_read(path)


BESIDE = {
    "counter": call("collections\nCounter", dictionary({"a": integer(1)})),
    "namespace": b"cargparse\nNamespace\n)\x81" + dictionary({"lr": integer(1)}) + b"b",
    "old number": call("numpy.core.multiarray\nscalar", integer(1)),
    "new array": call("numpy._core.multiarray\n_reconstruct", integer(1)) + b"(Nt" + b"b",
    "list of a class": b"comegaconf\nListConfig\n)R(" + integer(1) + integer(2) + b"e",
    "dictionary of a class": b"ceasydict\nEasyDict\n)\x81(" + text("a") + integer(1) + b"u",
    "instance": b"(" + integer(1) + b"ipathlib\nPosixPath\n",
    "set": b"\x8f(" + integer(1) + b"\x90",
    "long": b"\x8b" + (400).to_bytes(4, "little") + b"\x01" * 400,
    "tensor at the top": tensor("0", 6, (), ()),
    "numbers as keys": b"}(" + integer(1) + MATRIX + b"))u",
    "subclass": call("torch._tensor\n_rebuild_from_type_v2", b"cx\nf\n", b"cx\nT\n", b")", b"N"),
    "quantized": tensor("1", 3, (3,), (1,), storage="torch\nQInt8Storage"),
    "sparse": call("torch._utils\n_rebuild_sparse_tensor", integer(1), b")"),
    "optimizer": dictionary({"state": dictionary({"fc.weight": MATRIX})}),
    "damaged": tensor("0", 6, (7,), (1,)),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_the_weights_does_not_matter(tmp_path, beside):
    assert_read(written(tmp_path, {beside: BESIDE[beside], "weights of mine": STATE}))


def test_storages_beside_the_weights_are_skipped_in_the_old_stream(tmp_path):
    items = {"optimizer": dictionary({"a": BESIDE["quantized"]}), "model": STATE}
    path = tmp_path / "a.pth"
    write_legacy(path, dictionary(items), {"1": (3, bytes(3)), "0": (6, SIX.tobytes())})
    assert_read(path)


@pytest.mark.parametrize("value", ["counter", "subclass", "quantized", "sparse", "damaged"])
def test_inside_the_chosen_dictionary_it_is_refused_by_name(tmp_path, value):
    path = written(
        tmp_path, {"state_dict": dictionary({"a.b": BESIDE[value], "fc.weight": MATRIX})}
    )
    refused(path, r"no tensors: a\.b \(")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.net.", "backbone."],
)
def test_prefixes_of_wrappers_are_taken_off_in_both_kinds_of_files(tmp_path, prefix):
    assert_read(written(tmp_path, {"model_ema": dictionary({f"{prefix}fc.weight": MATRIX})}))
    path = tmp_path / "a.safetensors"
    save_file({f"{prefix}fc.weight": SIX.reshape(2, 3)}, path)
    assert_read(path)


def test_compiled_parts_and_averaged_models(tmp_path):
    names = {"module.a._orig_mod.weight": MATRIX, "n_averaged": tensor("0", 6, (), ())}
    assert_read(written(tmp_path, {"model": dictionary(names)}), names=["a.weight"])


def test_of_several_state_dicts_one_is_chosen(tmp_path):
    ema = dictionary({"state_dict": STATE, "decay": integer(1)})
    path = written(tmp_path, {"model": STATE, "ema": ema, "all": b"](" + STATE + b"e"})
    refused(path, r"several state dicts: model, ema/state_dict, all/0\. Choose one: key=")
    for key in ("model", "ema/state_dict", "all/0"):
        assert_read(path, key=key)
    with pytest.raises(ValueError, match=r"no emma; tensors are in model, ema/state_dict, all/0"):
        fj.convert.load_torch(path, key="emma")


def test_a_key_is_the_beginning_of_names_too(tmp_path):
    names = {"module.student.fc.weight": MATRIX, "module.loss.weight": MATRIX}
    path = written(tmp_path, {"state_dict": dictionary(names)})
    assert_read(path, names=["student.fc.weight", "loss.weight"])
    assert_read(path, key="state_dict/student")
    path = tmp_path / "a.safetensors"
    save_file({name: SIX.reshape(2, 3) for name in names}, path)
    assert_read(path, key="student")
    with pytest.raises(ValueError, match="no teacher; its names begin with module"):
        fj.convert.load_torch(path, key="teacher")


def test_whole_models_are_told_as_such(tmp_path):
    state = dictionary({"_parameters": b"}", "_modules": b"}"})
    path = written(tmp_path, {"model": b"cnets.mine\nNet\n)\x81" + state + b"b"})
    refused(path, r"whole model under model, an object of nets\.mine\.Net.*\['model'\]\.state_dict")


def test_a_home_directory_is_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, STATE)
    assert_read("~/a.pth")


def tuples_in_tuples(depth=60):
    return b")" + b"".join(b"q" + bytes([j]) + b"h" + bytes([j]) + b"\x86" for j in range(depth))


HOSTILE = {
    "exponential text": tuples_in_tuples(),
    "exponential key": b"}" + tuples_in_tuples() + MATRIX + b"s",
    "exponential reference": b"(" + tuples_in_tuples() + b"tQ",
    "exponential storage": b"(" + text("storage") + tuples_in_tuples() + text("0") + b"NK\x01tQ",
    "exponential call": b"cx\ny\n" + tuples_in_tuples() + b"R",
    "exponential offset": call("torch._utils\n_rebuild_tensor", *4 * [tuples_in_tuples()]),
    "long number": b"\x8b\xff\xff\xff\x7f",
    "long text": b"\x8d" + b"\xff" * 8,
    "many opcodes": b"}0" * 2**15,
    "deep": b"]" + b"]" * 10**5 + b"a" * 10**5,
    "pairs again and again": b"](](" + text("a") + b"Nee" + b"2" * 10**4,
    "escapes": dictionary({"\x1b[2J" + "a" * 10**6: integer(1)}),
    "name of a class": b"c\x1b[2J" + b"a" * 10**4 + b"\nb\n",
    "escapes in names": dictionary({"a.b": MATRIX, "\x1b[2J" + "a" * 10**6: b"N"}),
}


@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_pickles_take_little_work_and_end_with_a_short_message(
    tmp_path, content, monkeypatch
):
    if content == "many opcodes":
        monkeypatch.setattr(torch_pickle, "_LARGEST_COST", 2**15)
    for path in (
        written(tmp_path, HOSTILE[content]),
        write_legacy(tmp_path / "b.pth", HOSTILE[content], {}),
    ):
        calls, caught = calls_of(lambda path=path: fj.convert.load_torch(path))
        message = str(caught).removeprefix(str(path))
        assert "cannot be read" in message
        assert len(message) < 2000
        assert message.isprintable()
        # Checks of annotations, which are none of a user's, are calls, too.
        assert calls < 100_000 + 10 * len(HOSTILE[content])


def calls_of(function):
    """How many calls of Python's and C's functions one call makes, and what it raises."""
    calls = itertools.count()
    sys.setprofile(lambda frame, event, argument: next(calls) if "return" not in event else None)
    try:
        with pytest.raises(ValueError) as caught:
            function()
    finally:
        sys.setprofile(None)
    return next(calls), caught.value


def test_hostile_dictionaries_of_pairs_are_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_LARGEST_COST", 2**18)
    pairs = b"(" + 1000 * (b"(" + text("a") + b"Nt") + b"l"
    many = b"c__builtin__\ndict\nq\x01" + pairs + b"\x85q\x02" + 10**5 * b"h\x01h\x02R"
    refused(written(tmp_path, many), "more parts than a checkpoint has")
