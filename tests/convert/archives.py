"""Files of torch.save put together by hand, so that they can be wrong in any way."""

import pickle
import zipfile


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def integer(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def integers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(key, size, shape, strides, *, offset=0, storage="torch\nFloatStorage", view=b""):
    """The opcodes of a tensor in a storage of so many elements."""
    reference = b"(" + text("storage") + f"c{storage}\n".encode() + text(key) + text("cpu")
    place = integer(offset) + integers(shape) + integers(strides)
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + reference + integer(size) + view + b"tQ" + place + hooks + b"tR"


def dictionary(items):
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def pickle_of(content):
    return b"\x80\x02" + content + b"."


def write_archive(path, pickled, storages, *, order=b"little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        if order is not None:
            archive.writestr("archive/byteorder", order)
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values)
        archive.writestr("archive/version", b"3\n")
    return path


def write_legacy(path, content, storages, *, magic=0x1950A86A20F9469CFC6C, version=1001):
    """What torch.save wrote before version 1.6; storages are numbers of elements and bytes."""
    facts = {"protocol_version": version, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [magic, version, facts]
    data = b"".join(pickle.dumps(part, protocol=2) for part in parts) + pickle_of(content)
    data += pickle.dumps(list(storages), protocol=2)
    for count, values in storages.values():
        data += count.to_bytes(8, "little") + values
    path.write_bytes(data)
    return path
