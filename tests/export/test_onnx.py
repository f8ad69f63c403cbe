"""Networks as ONNX files: what onnxruntime gives, and of which nodes they are."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import MODELS, get_unit
from falcon_jax.models.vgg import adaptive_average_pool
from tests.compression.networks import Nested, Scanned, Small
from tests.export.runtime import assert_equal, evaluating, exported, images, run

# Widths at which a network is small, and its structure is as in full size.
NARROW = {
    "vgg8_cifar": {"width": 0.25},
    "vgg16_cifar": {"width": 0.125},
    "vgg19_cifar": {"width": 0.125},
    "resnet18_cifar": {"width": 0.125},
    "resnet34_cifar": {"width": 0.125},
    "resnet20_cifar": {"width": 0.5},
    "resnet18": {"width": 0.125, "num_classes": 10},
}


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


METHODS = (
    *slow(fj.Falcon(), fj.DepthwiseSeparable(rank=2)),
    fj.Falcon(rank=2),
    fj.Falcon(impl="gep"),
    fj.DepthwiseSeparable(),
    fj.Decoupled(terms=2),
    fj.Tucker(rank=3),
    fj.CP(rank=3),
    *slow(fj.TensorTrain(rank=3), fj.ChannelDecomposition(rank=2, inner="falcon")),
    fj.SpatialDecomposition(rank=3),
    fj.FilterSummary(ratio=4.0),
    fj.DifferentiableFilterSummary(ratio=4.0),
)
CONVS = {  # of a layer
    "falcon": 2,
    "depthwise_separable": 2,
    "tucker": 3,
    "cp": 4,
    "tensor_train": 4,
    "spatial_decomposition": 2,
    "channel_decomposition": 3,
    "filter_summary": 1,
    "differentiable_filter_summary": 1,
}


def small_vgg(**options):
    return evaluating(fj.models.vgg8_cifar(width=0.25, hidden=16, rngs=nnx.Rngs(0), **options))


def compressed(model, method, sample):
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=method)], sample))
    small.eval()
    return small


def between(path):
    """Types of the nodes, in order."""
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *slow(*(name for name in NARROW if name != "resnet18")),  # more of the same stages
    ],
)
def test_networks(tmp_path, name):
    model = evaluating(MODELS[name](rngs=nnx.Rngs(0), **NARROW[name]))
    others = [(images(1, 32, 48, 3),)]
    made = exported(tmp_path, model, images(2, 32, 32, 3), others=others)
    assert made.inputs == {"x": ("batch", "height", "width", 3)} and not made.fixed
    assert made.nodes["Transpose"] == 1  # of the images
    # BatchNorms are in the convolutions.
    assert set(made.nodes) <= {
        "Add", "Conv", "Gemm", "MaxPool", "ReduceMean", "Relu", "Transpose"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - set(NARROW)))
def test_large_networks(tmp_path, name):
    options = {"num_classes": 10, "width": 0.125}
    if name in ("resnet56_cifar", "resnet110_cifar", "resnet164_cifar"):
        options["width"] = 0.5
    side = 224 if name.startswith("vgg") else 64
    model = evaluating(MODELS[name](rngs=nnx.Rngs(0), **options))
    made = exported(tmp_path, model, images(1, side, side, 3), others=[(images(2, side, side, 3),)])
    assert made.inputs["x"][0] == "batch"


def test_a_classifier_for_one_size(tmp_path):
    """The quick stand-in for torchvision's VGGs: maps averaged to 7x7, flattened in their order."""
    weights = images(7 * 7 * 4, 5)

    def classifier(x):
        x = adaptive_average_pool(fj.ops.max_pool_2x2(x), 7)
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1) @ jnp.asarray(weights)

    for side in (14, 18):
        sample, other = images(2, side, side, 4), images(3, side, side, 4)
        made = exported(tmp_path, classifier, sample, others=[(other,)])
        assert made.inputs["x"] == ("batch", side, side, 4) and "height" in made.fixed


@pytest.mark.parametrize("unit", ["pdp", *slow("gdg", "pdp_split"), "branch"])
def test_units(tmp_path, unit):
    stem = fj.models.standard_unit
    model = fj.models.vgg8_cifar(
        width=0.5, hidden=8, unit=get_unit(unit), stem_unit=stem, rngs=nnx.Rngs(0)
    )
    exported(tmp_path, evaluating(model), images(2, 16, 16, 3), others=[(images(1, 24, 20, 3),)])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods(tmp_path, method):
    sample = images(2, 16, 16, 3)
    small = compressed(evaluating(Small(nnx.Rngs(0), m=8, n=8)), method, sample)
    made = exported(tmp_path, small, sample, others=[(images(1, 24, 16, 3),)])
    per_layer = CONVS.get(method.name)
    if getattr(method, "rank", 1) == 1 or method.name not in ("falcon", "depthwise_separable"):
        one = getattr(method, "impl", "auto") == "gep"
        assert per_layer is None or made.nodes["Conv"] == 2 * (1 if one else per_layer)
    assert made.nodes["Transpose"] == 1
    assert not {"Sub", "Mul", "Div", "BatchNormalization"} & set(made.nodes)


def test_falcon_is_two_convolutions_in_a_row(tmp_path):
    sample = images(2, 16, 16, 3)
    made = exported(tmp_path, compressed(small_vgg(), fj.Falcon(), sample), sample)
    layer = ["Conv", "Conv", "Relu"]
    pairs = [*layer * 2, "MaxPool", *layer * 2, "MaxPool", *layer * 2]
    assert between(made.path) == ["Transpose", *pairs, "ReduceMean", "Gemm", "Relu", "Gemm"]
    nodes = [n for n in onnx.load(made.path).graph.node if n.op_type == "Conv"]
    groups = [next(a.i for a in node.attribute if a.name == "group") for node in nodes]
    assert groups[::2] == [1] * 6 and groups[1::2] == [8, 8, 16, 16, 32, 32]


def test_ranks_are_wide_convolutions_and_depthwise_ones(tmp_path):
    sample = images(2, 16, 16, 3)
    model = evaluating(Small(nnx.Rngs(0)))
    made = exported(tmp_path, compressed(model, fj.Falcon(rank=3), sample), sample)
    assert made.nodes["Conv"] == 2 * (1 + 3) and made.nodes["Split"] == 2


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", ((2, 0), (0, 1))])
@pytest.mark.parametrize(
    "method", [fj.Falcon(rank=2), *slow(fj.DepthwiseSeparable(), fj.CP(rank=2))]
)
def test_geometries(tmp_path, method, padding):
    spec = fj.ConvSpec(
        kernel_size=(3, 2), in_features=4, out_features=6, strides=(2, 1), padding=padding
    )
    layer = fj.MethodConv(method, spec, rngs=nnx.Rngs(0))
    exported(tmp_path, layer, images(2, 9, 8, 4), open_sizes=("batch",))


def test_groups(tmp_path):
    spec = fj.ConvSpec(kernel_size=(3,), in_features=4, out_features=6, feature_group_count=2)
    for method in (fj.Falcon(rank=2), fj.DepthwiseSeparable(rank=2)):
        layer = fj.MethodConv(method, spec, rngs=nnx.Rngs(0))
        exported(tmp_path, layer, images(2, 9, 4), others=[(images(3, 5, 4),)])


def test_functions_of_ours(tmp_path):
    kernel, pointwise = images(3, 3, 4), images(4, 5)

    def function(x):
        x = fj.depthwise_conv(x, jnp.asarray(kernel), strides=2)
        return fj.separable_conv(x, jnp.asarray(images(3, 3, 5)), jnp.asarray(pointwise))

    made = exported(tmp_path, function, images(2, 9, 8, 4), open_sizes=())
    assert made.nodes["Conv"] == 3


def test_modules_in_containers_and_scans(tmp_path):
    for network in (Nested, Scanned):
        model = network(nnx.Rngs(0))
        sample = images(2, 8, 8, 3)
        exported(tmp_path, evaluating(model), sample, others=[(np.repeat(sample, 2, 0),)])


class Everything(nn.Module):
    """A Linen model that gives several arrays by name."""

    @nn.compact
    def __call__(self, x, scale=1.0, *, train=False):
        y = nn.Conv(8, (3, 3), strides=2)(x * scale)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = fj.linen.FalconConv(8, (3, 3), rank=2)(y)
        y = nn.ConvTranspose(8, (4, 4), strides=(2, 2))(y)
        y = nn.avg_pool(nn.max_pool(y, (2, 2), strides=(2, 2)), (3, 3), padding="SAME")
        return {"map": y, "logits": (nn.Dense(4)(y.mean(axis=(1, 2))), nn.GroupNorm(2)(y))}


def test_linen(tmp_path):
    x = images(2, 16, 16, 3)
    module = Everything()
    variables = module.init(jax.random.key(0), x)
    sample = fj.Inputs(x, train=False)
    made = fj.export.onnx(module.bind(variables), sample, tmp_path / "linen.onnx")
    for given in (x, images(3, 24, 20, 3)):
        assert_equal(made.path, lambda x: module.apply(variables, x), given)
    assert list(made.outputs) == ["logits_0", "logits_1", "map"]
    assert made.nodes["ConvTranspose"] == 1


def test_compressed_linen(tmp_path):
    x = images(2, 16, 16, 3)
    module = nn.Sequential([nn.Conv(6, (3, 3)), nn.relu, nn.Conv(5, (3, 3), padding="VALID")])
    variables = module.init(jax.random.key(0), x)
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=fj.Falcon())], x)
    small, new = fj.compress(module.bind(variables), plan).unbind()
    call = lambda x: small.apply(new, x)  # noqa: E731
    made = exported(tmp_path, small.bind(new), x, call=call, others=[(images(1, 20, 9, 3),)])
    assert made.nodes["Conv"] == 4


def test_several_inputs_have_names(tmp_path):
    def function(image, mask, *, factor):
        return image * mask * factor[:, None, None, None]

    sample = fj.Inputs(images(2, 8, 8, 3), images(2, 8, 8, 1), factor=images(2))
    made = fj.export.onnx(function, sample, tmp_path / "f.onnx")
    assert made.inputs == {
        "x0": ("batch", "height", "width", 3),
        "x1": ("batch", "height", "width", 1),
        "factor": ("batch",),
    }
    given = images(3, 4, 6, 3), images(3, 4, 6, 1), images(3)
    (y,) = run(made.path, *given)
    np.testing.assert_allclose(y, given[0] * given[1] * given[2][:, None, None, None], rtol=1e-6)


def test_names_of_outputs_do_not_meet(tmp_path):
    def function(x):
        return {
            "x": x,
            "y": (x + 1, x + 1),
            "y_0": 2 * x,
            "Add": x + 2,
            "three": jnp.full((2,), 3.0),
        }

    sample = images(2, 3)
    made = exported(tmp_path, function, sample, open_sizes=())
    assert len(made.outputs) == 6 and {"three", "y_0", "y_1"} <= set(made.outputs)


@pytest.mark.slow
def test_the_recognizer(tmp_path):
    from examples.ocr.recognizer import Recognizer

    model = evaluating(Recognizer(rngs=nnx.Rngs(0)))
    made = exported(tmp_path, model, images(2, 64, 40, 1), others=[(images(1, 64, 60, 1),)])
    assert made.nodes["Scan"] == 2 and made.nodes["Conv"] == 7  # both directions in one loop


def test_maps_resized_to_those_of_before(tmp_path):
    def skipped(x):
        y = x
        for _ in range(4):
            y = fj.ops.max_pool_2x2(y)
        y = jax.image.resize(y, (*x.shape[:3], 3), "bilinear")
        return jnp.concatenate([x, y], axis=-1)

    made = exported(tmp_path, skipped, images(1, 16, 16, 3), others=[(images(2, 32, 16, 3),)])
    assert made.nodes["Resize"] == 1 and not made.fixed


@pytest.mark.slow
def test_the_detector(tmp_path):
    from examples.ocr.detector import Detector

    model = evaluating(Detector(rngs=nnx.Rngs(0)))
    sample, others = images(1, 64, 64, 3), [(images(2, 96, 64, 3),)]
    rules = [fj.Rule(path="slices/0/0/conv", method=None), fj.Rule(method=fj.Falcon())]
    plan = fj.make_plan(model, rules, sample, solver="random")
    standard = exported(tmp_path, model, sample, others=others)
    convs = sum(isinstance(m, nnx.Conv) for _, m in nnx.iter_modules(model))
    assert standard.nodes["Conv"] == convs and standard.nodes["Resize"] == 3
    small = evaluating(fj.compress(model, plan))
    made = exported(tmp_path, small, sample, others=others)
    assert made.nodes["Conv"] == convs + len(plan.replaced)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its telemetry
def test_openvino_opens_the_file(tmp_path):
    openvino = pytest.importorskip("openvino")
    sample = images(2, 16, 16, 3)
    small = compressed(evaluating(Small(nnx.Rngs(0))), fj.Falcon(rank=2), sample)
    made = fj.export.onnx(small, sample, tmp_path / "model.onnx")
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(made.path), "CPU", options)
    np.testing.assert_allclose(
        compiled(sample)[0], small(jnp.asarray(sample)), rtol=1e-4, atol=1e-5
    )


def test_what_was_written_is_told(tmp_path):
    sample = images(1, 16, 16, 3)
    metadata = {"labels": "cat dog"}
    made = fj.export.onnx(small_vgg(), sample, tmp_path / "m.onnx", metadata=metadata, opset=20)
    text = str(made)
    assert f"{made.path.stat().st_size:,} bytes" in text and "6 Conv" in text
    assert "x (batch, height, width, 3)" in text and "y (batch, 10)" in text
    proto = onnx.load(made.path)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 20
    assert {p.key: p.value for p in proto.metadata_props} == metadata
    assert any(node.name.startswith("stages/0/0/conv/") for node in proto.graph.node)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


class Unmappable(nnx.Module):
    def __init__(self):
        self.inner = Inner()

    def __call__(self, x):
        return self.inner(x)


class Inner(nnx.Module):
    def __call__(self, x):
        return jax.lax.bessel_i0e(x)


def test_what_has_no_counterpart_is_named_with_its_place(tmp_path):
    file = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="'bessel_i0e' in 'inner' cannot be mapped"):
        fj.export.onnx(Unmappable(), images(1, 4), file)
    with pytest.raises(ValueError, match="random numbers are drawn"):
        fj.export.onnx(lambda x: x + jax.random.normal(jax.random.key(0), (4,)), images(4), file)
    with pytest.raises(ValueError, match="'x1' holds random keys"):
        fj.export.onnx(lambda x, key: x, (images(4), jax.random.key(0)), file)
    assert not file.exists()


def test_sizes_that_cannot_be_open(tmp_path):
    def for_one_size(x):
        return x @ jnp.ones((8, 3)) if x.shape[1] > 4 else x

    file = tmp_path / "m.onnx"

    def flat(x):
        return x.reshape(x.shape[0], -1) @ jnp.ones((8 * 8 * 3, 2))

    sample = images(2, 8, 8, 3)
    with pytest.raises(ValueError, match="cannot be exported with batch, height open"):
        fj.export.onnx(flat, sample, file, open_sizes=("batch", "height"))
    made = fj.export.onnx(flat, sample, file)
    assert made.inputs["x"] == ("batch", 8, 8, 3) and "height, width can be open" in made.fixed
    with pytest.raises(ValueError, match="no axis to leave open is called 'channels'"):
        fj.export.onnx(flat, sample, file, open_sizes=("channels",))
    with pytest.raises(ValueError, match="no axis height"):
        fj.export.onnx(lambda x: x, images(2, 3), file, open_sizes=("height",))
    made = fj.export.onnx(for_one_size, images(2, 8), file)
    assert made.inputs["x"] == ("batch", 8)


def test_bad_input(tmp_path, monkeypatch):
    sample, model, file = images(1, 16, 16, 3), small_vgg(), tmp_path / "m.onnx"
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        fj.export.onnx(model, sample, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        fj.export.onnx(model, sample, tmp_path)
    with pytest.raises(ValueError, match="opset is a whole number from 18"):
        fj.export.onnx(model, sample, file, opset=9)
    with pytest.raises(ValueError, match="cannot be called on the sample"):
        fj.export.onnx(model, images(1, 16, 16, 4), file)
    with pytest.raises(ValueError, match="got a str"):
        fj.export.onnx("model", sample, file)
    with pytest.raises(ValueError, match=r"module\.bind\(variables\)"):
        fj.export.onnx(Everything(), sample, file)
    with pytest.raises(ValueError, match="returns no array"):
        fj.export.onnx(lambda x: None, sample, file)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "falcon-jax\[export\]"'):
        fj.export.onnx(model, sample, file)
    assert not list(pathlib.Path(tmp_path).iterdir())
