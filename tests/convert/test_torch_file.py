"""Files of PyTorch without PyTorch: what is read, and what is refused."""

import os
import pickle
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

import falcon_jax as fj
from tests.convert.archives import (
    dictionary,
    integer,
    pickle_of,
    tensor,
    text,
    write_archive,
)

SIX = np.arange(6, dtype="<f4")


def archive_of(path, items, storages, **options):
    return write_archive(path, pickle_of(dictionary(items)), storages, **options)


@pytest.fixture
def plain(tmp_path):
    """A file with a matrix and its transpose, which share a storage."""
    items = {"a": tensor("0", 6, (2, 3), (3, 1)), "b": tensor("0", 6, (3, 2), (1, 3))}
    return archive_of(tmp_path / "plain.pth", items, {"0": SIX.tobytes()})


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        fj.convert.load_torch(path)
    assert str(path) in str(caught.value)


def test_strided_tensors_and_shared_storages(plain):
    named = fj.convert.load_torch(plain)
    np.testing.assert_array_equal(named["a"], SIX.reshape(2, 3))
    np.testing.assert_array_equal(named["b"], SIX.reshape(2, 3).T)
    assert np.shares_memory(named["a"], named["b"])


def test_slices_scalars_expanded_and_empty_tensors(tmp_path):
    items = {
        "column": tensor("0", 6, (2,), (3,), offset=1),
        "scalar": tensor("0", 6, (), (), offset=5),
        "expanded": tensor("0", 6, (4, 2), (0, 1)),
        "empty": tensor("1", 0, (0, 3), (3, 1)),
    }
    named = fj.convert.load_torch(
        archive_of(tmp_path / "a.pt", items, {"0": SIX.tobytes(), "1": b""})
    )
    np.testing.assert_array_equal(named["column"], [1, 4])
    assert named["scalar"] == 5
    np.testing.assert_array_equal(named["expanded"], [[0, 1]] * 4)
    assert named["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("HalfStorage", "f2"), ("FloatStorage", "f4"), ("DoubleStorage", "f8"),
        ("CharStorage", "i1"), ("ShortStorage", "i2"), ("IntStorage", "i4"),
        ("LongStorage", "i8"), ("ByteStorage", "u1"), ("BoolStorage", "?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("order", "sign"), [(b"little", "<"), (b"big", ">"), (None, "<")])
def test_all_types_in_both_byte_orders(tmp_path, storage, dtype, order, sign):
    values = np.array([0, 1, 1, 0]).astype(dtype)
    stored = values.astype(values.dtype.newbyteorder(sign)).tobytes()
    items = {"a": tensor("0", 4, (4,), (1,), storage=f"torch\n{storage}")}
    named = fj.convert.load_torch(archive_of(tmp_path / "a.pt", items, {"0": stored}, order=order))
    assert named["a"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(named["a"], values)


@pytest.mark.parametrize("order", [b"little", b"big"])
def test_bfloat16(tmp_path, order):
    stored = struct.pack(f"{'<' if order == b'little' else '>'}2H", 0x3F80, 0xC000)
    items = {"a": tensor("0", 2, (2,), (1,), storage="torch\nBFloat16Storage")}
    named = fj.convert.load_torch(archive_of(tmp_path / "a.pt", items, {"0": stored}, order=order))
    assert named["a"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(named["a"].astype(np.float32), [1, -2])


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "net"])
def test_dictionaries_around_and_prefixes_of_data_parallel_are_taken_off(tmp_path, wrapper):
    inner = dictionary({"module.fc.weight": tensor("0", 6, (2, 3), (3, 1))})
    outer = {"epoch": integer(3), "optimizer": dictionary({}), wrapper: inner}
    named = fj.convert.load_torch(archive_of(tmp_path / "a.pt", outer, {"0": SIX.tobytes()}))
    assert list(named) == ["fc.weight"]


def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path):
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps({"a": Evil()}, protocol)
        refused(write_archive(tmp_path / "a.pt", data, {}), f"{os.system.__module__}.system")
    inst = f"(S'touch {trace}'\nios\nsystem\n.".encode()
    refused(write_archive(tmp_path / "a.pt", inst, {}), "os.system|opcode STRING")
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "torch._utils\n_rebuild_tensor_v3", "torch\nload", "argparse\nNamespace"],
)
def test_every_other_global_is_named(tmp_path, name):
    data = pickle_of(f"c{name}\n".encode())
    refused(write_archive(tmp_path / "a.pt", data, {}), name.replace("\n", r"\."))


@pytest.mark.parametrize(
    ("view", "match"),
    [
        (tensor("0", 6, (7,), (1,)), "outside its storage of 6"),
        (tensor("0", 6, (2, 3), (4, 1)), "outside"),
        (tensor("0", 6, (), (), offset=6), "outside"),
        (tensor("0", 6, (2,), (-1,), offset=3), r"strides \(-1,\)"),
        (tensor("0", 6, (2,), (1,), offset=-1), "offset -1"),
        (tensor("0", 6, (2,), (1, 1)), "has shape"),
        (tensor("0", 2**30, (2,), (1,)), "data/0 has 24 bytes instead of 4294967296"),
        (tensor("1", 6, (6,), (1,)), "data/1 is missing"),
        (tensor("0", 6, (2**31 - 1, 2**31 - 1, 4), (0, 0, 0)), "too big"),
        (tensor("0", 6, (6,), (1,), storage="torch\nfloat32"), "storage of torch.float32"),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, view, match):
    refused(archive_of(tmp_path / "a.pt", {"a": view}, {"0": SIX.tobytes()}), match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (integer(3), "it holds int, not a state dict"),
        (dictionary({"epoch": integer(3)}), "it holds epoch, but no tensors"),
        (dictionary({}), "it holds nothing, but no tensors"),
        (dictionary({"a": tensor("0", 6, (6,), (1,)), "n": integer(3)}), "no tensors: n"),
        (b"}(" + integer(1) + tensor("0", 6, (6,), (1,)) + b"u", "names that are no text: 1"),
        (b"})" + tensor("0", 6, (6,), (1,)) + b"s", "names that are no text: \\(\\)"),
        (b"u", "damaged"),
        (b"h\x05", "damaged"),
        (integer(1) + integer(2), "leaves 2 values"),
        (b"(" + text("storage") + b"tQ", "a reference is to no storage"),
        (b"ccollections\nOrderedDict\n" + integer(1) + b"\x85R", "holds collections.OrderedDict"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "in a form that torch.save does not"),
        (b"\x82\x01", "an extension"),
        (b"\xff", "there is no opcode 255"),
        (b"X\xff\xff\xff\x7fabc", "damaged"),
    ],
)
def test_pickles_that_hold_no_state_dict_are_refused(tmp_path, content, match):
    path = write_archive(tmp_path / "a.pt", pickle_of(content), {"0": SIX.tobytes()})
    refused(path, match)


def test_compressed_entries_are_refused(tmp_path):
    items = {"a": tensor("0", 2**20, (2**20,), (1,))}
    bomb = archive_of(
        tmp_path / "a.pt", items, {"0": bytes(2**22)}, compression=zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 2**16
    refused(bomb, "compressed, which torch.save never does")


def test_entries_that_share_bytes_are_refused(plain, tmp_path):
    data = plain.read_bytes()
    start = struct.unpack("<I", data[-6:-2])[0]
    directory, count = data[start:-22], data.count(b"PK\x01\x02")
    sizes = (0, 0, 9 * count, 9 * count, 9 * len(directory), start, 0)
    path = tmp_path / "overlapping.pt"
    path.write_bytes(data[:start] + 9 * directory + struct.pack("<4s4H2IH", b"PK\x05\x06", *sizes))
    refused(path, "larger than the file|more than once")


def test_torchscript_and_other_zip_files_are_refused(tmp_path):
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_of(dictionary({})))
        archive.writestr("archive/code/model.py", b"")
    refused(path, "TorchScript")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"")
    refused(path, "not one of torch.save")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "neither a zip archive of torch.save nor safetensors"),
        (pickle.dumps({}), "a pickle, but not one of torch.save"),
        (b"PK\x03\x04", "truncated or damaged"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, match):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refused(path, match)


def test_files_that_are_not_there_are_os_errors(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(OSError, match=r".*"):
            fj.convert.load_torch(path)


def same(named, expected):
    return named.keys() == expected.keys() and all(
        named[k].dtype == v.dtype and np.array_equal(named[k], v) for k, v in expected.items()
    )


def damaged(data, generator):
    changed = bytearray(data)
    changed[generator.randrange(len(data))] ^= generator.randrange(1, 256)
    return bytes(changed)


def test_damaged_bytes_give_an_error_or_the_same_tensors(plain, tmp_path):
    expected, data = fj.convert.load_torch(plain), plain.read_bytes()
    generator, path, errors = random.Random(0), tmp_path / "damaged.pth", 0
    for _ in range(600):
        path.write_bytes(damaged(data, generator))
        try:
            named = fj.convert.load_torch(path)
        except (ValueError, OSError):
            errors += 1
        else:
            assert same(named, expected)
    assert errors > 100


def test_damaged_pickles_give_an_error_or_small_arrays(plain, tmp_path):
    with zipfile.ZipFile(plain) as archive:
        data = archive.read("archive/data.pkl")
    generator, path = random.Random(0), tmp_path / "damaged.pth"
    for _ in range(600):
        write_archive(path, damaged(data, generator), {"0": SIX.tobytes()})
        try:
            named = fj.convert.load_torch(path)
        except ValueError:
            continue
        assert all(isinstance(array, np.ndarray) for array in named.values())


def test_truncated_files_are_refused(plain, tmp_path):
    data, path = plain.read_bytes(), tmp_path / "truncated.pth"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        refused(path, "empty|neither|truncated|damaged")


def test_what_torch_saves(torch, tmp_path):
    base = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    state = {
        "transposed": base.t(),
        "slice": base[1:, 2],
        "half": base.half(),
        "bfloat16": torch.nn.Parameter(base.bfloat16()),
        "double": base.double(),
        "count": torch.tensor(3),
        "mask": base > 0,
        "empty": torch.zeros(0, 3),
        "expanded": torch.ones(1).expand(4, 3),
    }
    for protocol, zipped in ((2, True), (4, True), (2, False), (4, False)):
        torch.save(
            state,
            tmp_path / "a.pth",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        named = fj.convert.load_torch(tmp_path / "a.pth")
        assert list(named) == list(state)
        for name, value in state.items():
            assert named[name].shape == tuple(value.shape)
            assert str(named[name].dtype) == str(value.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(
                named[name].astype(np.float64), value.detach().double().numpy()
            )


def test_checkpoints_of_torch_training(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model[0].weight.sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "best": 0.5,
        "model": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "a.pth")
    named = fj.convert.load_torch(tmp_path / "a.pth")
    assert list(named) == ["0.weight", "0.bias"]
    np.testing.assert_array_equal(named["0.weight"], model[0].weight.detach().numpy())


def test_whole_models_of_torch_are_refused(torch, tmp_path):
    path = tmp_path / "a.pth"
    for zipped in (True, False):
        torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
        refused(path, r"torch\.nn\.modules\.linear\.Linear")
