"""Parameters and mult-adds against the cells of the paper's Tables 4 and 5 that have our models."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.models import method_unit, standard_unit

FALCON = {f"FALCON-k{rank}": fj.Falcon(rank=rank) for rank in (1, 2, 3)}
METHODS = {
    "StConv": None,
    "FALCON": fj.Falcon(rank=1),
    "FALCON without fitting": fj.Falcon(rank=1),
    **FALCON,
    "GEP-in": fj.DepthwiseSeparable(rank=1),
    "DPConv": fj.DepthwiseSeparable(rank=1),
}

# Model, classes (CIFAR100 has 100, SVHN 10), method, parameters and mult-adds in millions.
TABLES = [
    ("VGG19", 100, "StConv", "20.35", "398.75"),
    ("ResNet34", 100, "StConv", "21.34", "292.57"),
    ("VGG19", 100, "FALCON", "2.61", "47.28"),
    ("ResNet34", 100, "FALCON", "2.67", "46.38"),
    ("VGG19", 100, "FALCON without fitting", "2.61", "47.28"),
    ("ResNet34", 100, "FALCON without fitting", "2.67", "46.38"),
    ("VGG19", 100, "GEP-in", "2.61", "46.46"),
    ("ResNet34", 100, "GEP-in", "2.67", "38.45"),
    ("VGG19", 100, "DPConv", "2.61", "48.07"),
    ("ResNet34", 100, "DPConv", "2.67", "38.45"),
    ("VGG19", 10, "StConv", "20.30", "398.70"),
    ("ResNet34", 10, "StConv", "21.29", "292.52"),
    ("VGG19", 10, "FALCON", "2.56", "47.23"),
    ("ResNet34", 10, "FALCON", "2.63", "46.33"),
    ("VGG19", 10, "FALCON without fitting", "2.56", "47.23"),
    ("ResNet34", 10, "FALCON without fitting", "2.63", "46.33"),
    ("VGG19", 10, "GEP-in", "2.56", "46.41"),
    ("ResNet34", 10, "GEP-in", "2.62", "38.41"),
    ("VGG19", 10, "DPConv", "2.56", "48.02"),
    ("ResNet34", 10, "DPConv", "2.62", "38.41"),
    ("VGG19", 100, "FALCON-k1", "2.61", "47.28"),
    ("ResNet34", 100, "FALCON-k1", "2.67", "46.38"),
    ("VGG19", 100, "FALCON-k2", "4.88", "94.24"),
    ("ResNet34", 100, "FALCON-k2", "5.08", "88.25"),
    ("VGG19", 100, "FALCON-k3", "7.16", "141.21"),
    ("ResNet34", 100, "FALCON-k3", "7.49", "130.13"),
    ("VGG19", 10, "FALCON-k1", "2.56", "47.23"),
    ("ResNet34", 10, "FALCON-k1", "2.63", "46.33"),
    ("VGG19", 10, "FALCON-k2", "4.84", "94.20"),
    ("ResNet34", 10, "FALCON-k2", "5.04", "88.21"),
    ("VGG19", 10, "FALCON-k3", "7.11", "141.16"),
    ("ResNet34", 10, "FALCON-k3", "7.45", "130.08"),
]

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


BUILDERS = {"VGG19": fj.models.vgg19_cifar, "ResNet34": fj.models.resnet34_cifar}
HEAD_INPUTS = 512


def shapes_of(model, classes, **options):
    """A model whose arrays are shapes only, so that nothing is computed."""
    return nnx.eval_shape(lambda: BUILDERS[model](num_classes=classes, rngs=nnx.Rngs(0), **options))


@functools.cache
def counts(model, method, standard_stem):
    options = {} if method is None else {"unit": method_unit(method)}
    if standard_stem:
        options["stem_unit"] = standard_unit
    return fj.profile(shapes_of(model, 100, **options), IMAGE).as_paper_counts


def printed(counts):
    return tuple(f"{count / 1e6:.2f}" for count in counts)


@pytest.mark.parametrize(("model", "classes", "label", "params", "mult_adds"), TABLES)
def test_models_built_from_units(model, classes, label, params, mult_adds):
    standard_stem = model == "VGG19" and label == "DPConv"
    ours = counts(model, METHODS[label], standard_stem)
    # Classes change the last layer alone: a product and a bias.
    ours = tuple(count - (100 - classes) * (HEAD_INPUTS + 1) for count in ours)
    assert printed(ours) == (params, mult_adds)


def test_a_model_with_ten_classes():
    model = "VGG19"
    expected = next(cells[3:] for cells in TABLES if cells[:3] == (model, 10, "StConv"))
    assert printed(fj.profile(shapes_of(model, 10), IMAGE).as_paper_counts) == expected


@functools.cache
def standard(model):
    return shapes_of(model, 100)


def rules(model, label):
    units = fj.Rule(path=r"stages/.*/conv", method=METHODS[label])
    stays = {"ResNet34": r"stem/conv|.*/shortcut/conv", "VGG19": r"stages/0/0/conv"}[model]
    if model == "VGG19" and label != "DPConv":
        return [units]
    return [fj.Rule(path=stays, method=None), units]


@pytest.mark.parametrize(
    ("model", "label"),
    [("VGG19", "DPConv"), ("VGG19", "FALCON-k3"), ("ResNet34", "GEP-in")],
)
def test_standard_models_under_a_plan(model, label):
    plan = fj.make_plan(standard(model), rules(model, label), IMAGE, solver="random")
    expected = next(cells[3:] for cells in TABLES if cells[:3] == (model, 100, label))
    params, mult_adds = plan.after.params, plan.after.mult_adds
    for row in plan.replaced:
        # The paper's layers have a BatchNorm that is never used (2 N parameters), and no bias.
        n, points = row.spec.out_features, row.before.mult_adds // row.before.params
        params += 2 * n - n
        mult_adds -= points * n
    assert printed((params, mult_adds)) == expected


@pytest.mark.parametrize(("model", "label"), [("VGG19", "FALCON-k1"), ("ResNet34", "FALCON-k2")])
def test_standard_models_compressed(model, label):
    plan = fj.make_plan(standard(model), rules(model, label), IMAGE, solver="random")
    small = nnx.eval_shape(lambda model: fj.compress(model, plan), standard(model))
    expected = next(cells[3:] for cells in TABLES if cells[:3] == (model, 100, label))
    profile = fj.profile(small, IMAGE)
    assert printed(profile.as_paper_counts) == expected
    assert (profile.params, profile.mult_adds) == (plan.after.params, plan.after.mult_adds)


def test_counting_by_hand_what_the_smallest_model_costs():
    network = nnx.eval_shape(lambda: fj.models.vgg8_cifar(rngs=nnx.Rngs(0)))
    profile = fj.profile(network, IMAGE)
    params = mult_adds = 0
    size, width = 32, 3
    for stage in ((32, 32), (64, 64), (128, 128)):
        for features in stage:
            params += 9 * width * features + features + 2 * features
            mult_adds += size**2 * features * (9 * width + 1)
            width = features
        size //= 2
    for m, n in ((128, 128), (128, 10)):
        params += (m + 1) * n
        mult_adds += (m + 1) * n
    assert (profile.params, profile.mult_adds) == (params, mult_adds)
    assert profile.as_paper_counts == (params, mult_adds)
    arrays = jax.tree.leaves(nnx.state(network, nnx.Param))
    assert sum(array.size for array in arrays) == params
