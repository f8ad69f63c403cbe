import pytest

from falcon_jax.manifest import MANIFEST, check_manifest, write_manifest


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "below" / "b.bin").write_bytes(bytes(range(256)))
    write_manifest(tmp_path)
    return tmp_path


def test_what_was_saved_passes(directory):
    check_manifest(directory)
    (directory / "more").write_text("new")
    check_manifest(directory)


def test_every_flipped_bit_is_told(directory):
    for name in ["a.txt", "below/b.bin", MANIFEST]:
        content = (directory / name).read_bytes()
        for i in range(len(content)):
            (directory / name).write_bytes(
                content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :]
            )
            with pytest.raises(ValueError, match=f"damaged: {name} is not what was saved"):
                check_manifest(directory)
        (directory / name).write_bytes(content)


def test_missing_and_cut_files_are_told(directory):
    (directory / "a.txt").write_text("on")
    with pytest.raises(ValueError, match=r"a\.txt is not what"):
        check_manifest(directory)
    (directory / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt is missing"):
        check_manifest(directory)
    (directory / MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json is not what"):
        check_manifest(directory)
    (directory / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError):
        check_manifest(directory)
