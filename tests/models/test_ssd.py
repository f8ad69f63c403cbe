"""SSD300: the network against PyTorch, its cost by hand, boxes against torchvision and by loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import (
    decode_boxes,
    default_boxes,
    detect,
    model_shapes,
    ssd300_vgg16,
)
from falcon_jax.models.registry import same_key_rngs
from tests.export.runtime import exported

IMAGE = jax.ShapeDtypeStruct((1, 300, 300, 3), jnp.float32)
POINTS = (38, 19, 10, 5, 3, 1)  # along a side of the maps
BOXES = (4, 6, 6, 6, 4, 4)


def shapes(**options):
    return nnx.eval_shape(lambda: ssd300_vgg16(rngs=same_key_rngs(), **options))


@pytest.fixture(scope="module")
def narrow():
    graphdef, state = nnx.split(shapes(num_classes=3, width=1 / 32))
    rng = np.random.default_rng(0)

    def drawn(leaf):
        limit = (6 / max(np.prod(leaf.shape[:-1]), 6)) ** 0.5
        return jnp.asarray(rng.uniform(-limit, limit, leaf.shape), leaf.dtype)

    # Faster than compiling the initialisation.
    return nnx.merge(graphdef, jax.tree.map(drawn, state))


def image(count=1, side=300):
    x = np.random.default_rng(0).normal(size=(count, side, side, 3)).astype(np.float32)
    return jnp.asarray(x)


def by_functions(torch, weights, x, classes):
    """SSD300 of torchvision's state dict, written out in PyTorch's functions."""
    f = torch.nn.functional

    def conv(name, x, **options):
        return f.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def rectified(name, x, **options):
        return torch.relu(conv(name, x, **options))

    numbers = iter((0, 2, 5, 7, 10, 12, 14, 17, 19, 21))
    for stage, layers in enumerate((2, 2, 3, 3)):
        x = f.max_pool2d(x, 2, 2, ceil_mode=stage == 3) if stage else x
        for _ in range(layers):
            x = rectified(f"backbone.features.{next(numbers)}", x, padding=1)
    maps = [f.normalize(x) * weights["backbone.scale_weight"].view(1, -1, 1, 1)]
    x = f.max_pool2d(x, 2, 2)
    for number in (1, 3, 5):
        x = rectified(f"backbone.extra.0.{number}", x, padding=1)
    x = f.max_pool2d(x, 3, 1, padding=1)
    x = rectified("backbone.extra.0.7.1", x, padding=6, dilation=6)
    maps.append(rectified("backbone.extra.0.7.3", x))
    for number, form in enumerate(({"padding": 1, "stride": 2},) * 2 + ({},) * 2, 1):
        x = rectified(f"backbone.extra.{number}.0", maps[-1])
        maps.append(rectified(f"backbone.extra.{number}.2", x, **form))
    given = []
    for head, values in (("classification", classes), ("regression", 4)):
        found = []
        for number, x in enumerate(maps):
            y = conv(f"head.{head}_head.module_list.{number}", x, padding=1)
            found.append(y.permute(0, 2, 3, 1).reshape(len(x), -1, values))
        given.append(torch.cat(found, 1).numpy())
    return given


def state_of(names_and_shapes, seed=0):
    """Random weights that keep activations finite."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in names_and_shapes:
        if len(shape) > 1:
            limit = (6 / np.prod(shape[1:])) ** 0.5
            state[name] = rng.uniform(-limit, limit, shape).astype(np.float32)
        else:
            state[name] = rng.uniform(0.1, 20 if "scale" in name else 0.3, shape).astype("f4")
    return state


def narrow_shapes(theirs, channels, classes):
    """Names and shapes of torchvision's state dict, with channels divided by 32."""
    for name, shape in theirs:
        first = name == "backbone.features.0.weight"
        head = "head." in name
        n = shape[0] if head else shape[0] // channels
        n = n // 91 * classes if "classification" in name else n
        if len(shape) == 1:
            yield name, (n,)
        else:
            yield name, (n, shape[1] if first else shape[1] // channels, *shape[2:])


def meta_shapes(torch, torchvision):
    with torch.device("meta"):
        model = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None)
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def test_weights_of_torchvision_names_give_what_pytorch_gives(narrow, torchvision):
    torch = pytest.importorskip("torch")
    state = state_of(narrow_shapes(meta_shapes(torch, torchvision), 32, 3))
    model = fj.convert.torchvision(narrow, state)
    x = image(2)
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    expected = by_functions(torch, tensors, torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)), 3)
    for found, wanted in zip(nnx.jit(lambda m, x: m(x))(model, x), expected, strict=True):
        assert found.shape == wanted.shape
        scale = np.abs(wanted).max()
        assert scale > 1e-3
        np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=1e-5)


def test_every_array_of_torchvision_has_its_place(torchvision):
    torch = pytest.importorskip("torch")
    theirs = meta_shapes(torch, torchvision)
    state = nnx.state(shapes(), nnx.Param)
    assert sum(v.size for v in jax.tree.leaves(state)) == sum(np.prod(s) for _, s in theirs)
    assert len(jax.tree.leaves(state)) == len(theirs)


@pytest.mark.slow
def test_the_whole_network_gives_what_torchvision_gives(torchvision):
    torch = pytest.importorskip("torch")
    theirs = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None).eval()
    state = state_of([(name, tuple(value.shape)) for name, value in theirs.state_dict().items()])
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    x = image()
    with torch.no_grad():
        maps = theirs.backbone(torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)))
        head = theirs.head(list(maps.values()))
    expected = [head["cls_logits"].numpy(), head["bbox_regression"].numpy()]
    assert expected[0].shape == (1, 8732, 91)
    model = fj.convert.torchvision(shapes(), state)
    for found, wanted in zip(nnx.jit(lambda m, x: m(x))(model, x), expected, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=1e-4)


def test_another_number_of_classes_takes_a_new_head(narrow, torchvision):
    torch = pytest.importorskip("torch")
    state = state_of(narrow_shapes(meta_shapes(torch, torchvision), 32, 5))
    with pytest.raises(ValueError, match=r"has 5 classes in the weights and 3 in the model") as e:
        fj.convert.torchvision(narrow, state)
    assert str(e.value).count("classes in the weights") == 1
    new = fj.convert.torchvision(narrow, state, head="new")
    old = narrow.classification[0].kernel[...]
    np.testing.assert_array_equal(new.classification[0].kernel[...], old)
    given = state["head.regression_head.module_list.5.bias"]
    np.testing.assert_array_equal(new.regression[5].bias[...], given)


# Of every convolution but the heads: inputs, outputs, taps, points in and out.
VGG = [
    (3, 64, 9, 300**2, 300**2), (64, 64, 9, 300**2, 300**2),
    (64, 128, 9, 150**2, 150**2), (128, 128, 9, 150**2, 150**2),
    (128, 256, 9, 75**2, 75**2), *[(256, 256, 9, 75**2, 75**2)] * 2,
    (256, 512, 9, 38**2, 38**2), *[(512, 512, 9, 38**2, 38**2)] * 2,
    *[(512, 512, 9, 19**2, 19**2)] * 3,
]  # fmt: skip
EXTRA = [
    (512, 1024, 9, 19**2, 19**2), (1024, 1024, 1, 19**2, 19**2),
    (1024, 256, 1, 19**2, 19**2), (256, 512, 9, 19**2, 10**2),
    (512, 128, 1, 10**2, 10**2), (128, 256, 9, 10**2, 5**2),
    (256, 128, 1, 5**2, 5**2), (128, 256, 9, 5**2, 3**2),
    (256, 128, 1, 3**2, 3**2), (128, 256, 9, 3**2, 1),
]  # fmt: skip
HEADS = [
    (m, boxes * values, 9, side**2, side**2)
    for values in (91, 4)
    for m, boxes, side in zip((512, 1024, 512, 256, 256, 256), BOXES, POINTS, strict=True)
]


def standard_cost(m, n, taps, _, out):
    return np.array([n * (taps * m + 1), out * n * (taps * m + 1)])


def decoupled_cost(m, n, taps, inside, out, *, terms):
    """Pointwise to every term's n maps on the input's points, then depthwise; one bias."""
    return np.array([terms * n * (m + taps) + n, terms * n * (inside * m + out * taps) + out * n])


def by_hand(terms):
    """Cost with VGG's convolutions but the first decoupled, as the paper has it."""
    cost = sum(standard_cost(*layer) for layer in VGG[:1] + EXTRA + HEADS)
    return cost + sum(decoupled_cost(*layer, terms=terms) for layer in VGG[1:])


@pytest.fixture(scope="module")
def whole():
    return shapes()


def test_parameters_and_mult_adds_of_the_whole_network(whole):
    profile = fj.profile(whole, IMAGE)
    params, mult_adds = sum(standard_cost(*layer) for layer in VGG + EXTRA + HEADS)
    assert (profile.params, profile.mult_adds) == (params + 512, mult_adds)
    # torchvision's own numbers, which leave biases out.
    biases = sum(n * out for _, n, _, _, out in VGG + EXTRA + HEADS)
    assert (profile.params, round((mult_adds - biases) / 1e9, 3)) == (35_641_826, 34.858)


@pytest.mark.parametrize(
    ("method", "terms"),
    [(fj.Falcon(), 1), (fj.Decoupled(terms=2), 2)],
    ids=["falcon", "decoupled"],
)
def test_mult_adds_with_vgg_decoupled(whole, method, terms):
    vgg = r"features/(?!0$)\d+|extra/0/[135]"
    rules = [fj.Rule(path=vgg, method=method), fj.Rule(method=None)]
    plan = fj.make_plan(whole, rules, IMAGE, solver="random")
    assert len(plan.replaced) == 12
    params, mult_adds = by_hand(terms)
    assert (plan.after.params, plan.after.mult_adds) == (params + 512, mult_adds)


@pytest.mark.slow
def test_every_3x3_convolution_is_falcon_s(whole):
    rules = [
        fj.Rule(path="features/0", method=None),
        fj.Rule(method=fj.Falcon(), where=lambda spec: spec.kernel_size == (3, 3)),
        fj.Rule(method=None),
    ]
    plan = fj.make_plan(whole, rules, IMAGE, solver="random")
    small = nnx.eval_shape(lambda model: fj.compress(model, plan), whole)
    layers = VGG[1:] + EXTRA + HEADS
    wide = sum(decoupled_cost(*layer, terms=1) for layer in layers if layer[2] == 9)
    rest = sum(standard_cost(*layer) for layer in VGG[:1] + [la for la in EXTRA if la[2] == 1])
    profile = fj.profile(small, IMAGE)
    assert (profile.params, profile.mult_adds) == tuple(wide + rest + [512, 0])


@pytest.mark.slow
def test_compressed_and_deployed(narrow):
    rules = [fj.Rule(path="features/0", method=None), fj.Rule(method=fj.Falcon(rank="full"))]
    x = image(2)
    small = fj.compress(narrow, fj.make_plan(narrow, rules, x))
    expected = nnx.jit(lambda m, x: m(x))(narrow, x)
    for found, wanted in zip(fj.deploy(small, x, native=False)(x), expected, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_exported(tmp_path, narrow):
    made = exported(tmp_path, narrow, image(), others=[(image(2),)])
    assert made.nodes["MaxPool"] == 5
    assert made.inputs["x"] == ("batch", 300, 300, 3)
    assert "SSD is for images of one size" in made.fixed


def test_images_that_are_too_small_are_refused(narrow):
    with pytest.raises(ValueError, match="at least 268x268 pixels"):
        narrow(image(1, 267))
    found = nnx.eval_shape(lambda m: m(image(1, 268)), narrow)
    assert found[0].shape[1] == default_boxes(268, 268).shape[0]
    with pytest.raises(ValueError, match="got 300x200"):
        default_boxes(300, 200)


def test_points_without_features_have_gradients():
    norm = fj.models.ssd.ChannelNorm(3, scale=20)
    x = jnp.zeros((1, 1, 2, 3)).at[0, 0, 1].set(jnp.array([3.0, 0.0, 4.0]))
    np.testing.assert_allclose(norm(x)[0, 0], [[0, 0, 0], [12, 0, 16]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all()


def test_no_classifier_has_the_name_of_a_detector():
    with pytest.raises(ValueError, match="no model is called 'ssd300_vgg16'"):
        model_shapes("ssd300_vgg16")


@pytest.fixture(scope="module")
def their_boxes(torchvision):
    """torchvision's default boxes of 300x300 pixels, and the function that moves them."""
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None)
    images = torchvision.models.detection.image_list.ImageList(
        torch.zeros(1, 3, 300, 300), [(300, 300)]
    )
    maps = [torch.zeros(1, 1, side, side) for side in POINTS]
    (corners,) = model.anchor_generator(images, maps)
    return corners, model.box_coder.decode_single


def test_boxes_are_those_of_torchvision(their_boxes):
    torch = pytest.importorskip("torch")
    corners, decode = their_boxes
    boxes = default_boxes()
    still = decode_boxes(jnp.zeros((8732, 4)), boxes)
    np.testing.assert_allclose(still * 300, corners.numpy(), rtol=0, atol=1e-3)
    offsets = np.random.default_rng(0).normal(size=(8732, 4), scale=3).astype(np.float32)
    offsets[:5, 2:] = 100
    moved = decode(torch.from_numpy(offsets), corners).numpy()
    found = decode_boxes(jnp.asarray(offsets), boxes) * 300
    np.testing.assert_allclose(found, moved, rtol=1e-4, atol=1e-2)


def by_loops(logits, corners, least, overlap, candidates, limit):
    """Objects in one image: (score, label, corners), the surest first."""
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    p = exponents / exponents.sum(1, keepdims=True)
    found = []
    for label in range(1, p.shape[1]):
        sure = [i for i in np.argsort(-p[:, label], kind="stable") if p[i, label] > least]
        kept = []
        for i in sure[:candidates]:
            if all(share(corners[i], corners[j]) <= overlap for j in kept):
                kept.append(i)
        found += [(p[i, label], label, tuple(corners[i])) for i in kept]
    return sorted(found, reverse=True)[:limit]


def share(a, b):
    sides = [max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    common = sides[0] * sides[1]
    return common / (sum(areas) - common)


@pytest.mark.parametrize(("least", "limit"), [(0.3, 50), (0.05, 12)])
def test_objects_are_those_that_loops_find(least, limit):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 60, 4), scale=2).astype(np.float32)
    offsets = rng.normal(size=(2, 60, 4)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.6, (60, 4)).astype(np.float32)
    settings = {"least_score": least, "candidates": 20, "limit": limit}
    found = jax.jit(functools.partial(detect, **settings))(
        jnp.asarray(logits), jnp.asarray(offsets), jnp.asarray(boxes)
    )
    assert found.boxes.shape == (2, limit, 4)
    corners = np.clip(decode_boxes(jnp.asarray(offsets), jnp.asarray(boxes)), 0, 1)
    for i in range(2):
        expected = by_loops(logits[i], corners[i].astype(float), least, 0.45, 20, limit)
        count = len(expected)
        assert count == limit or not np.any(found.scores[i][count:])
        assert not np.any(found.labels[i][count:]) and not np.any(found.boxes[i][count:])
        scores, labels, places = zip(*expected, strict=True)
        np.testing.assert_allclose(found.scores[i][:count], scores, rtol=1e-5)
        np.testing.assert_array_equal(found.labels[i][:count], labels)
        np.testing.assert_allclose(found.boxes[i][:count], places, atol=1e-6)


def test_a_point_with_nothing_sure_has_no_objects():
    found = detect(
        jnp.zeros((1, 5, 91)), jnp.zeros((1, 5, 4)), default_boxes()[:5], least_score=0.5
    )
    assert not found.scores.any() and not found.labels.any() and found.scores.shape == (1, 200)
