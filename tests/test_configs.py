import functools
import importlib
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from falcon_jax.compression import make_plan
from falcon_jax.methods import get_method
from falcon_jax.models import get_model, model_shapes
from falcon_jax.training.config import check_config

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
SHARED = {"__init__", "paper", "compare"}  # tests/test_comparison.py has the last
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)
PAPER = [name for name in NAMES if name.startswith(("vgg19_", "resnet34_"))]
IMAGENET = [f"{m}_imagenet{s}" for m in ("vgg16_bn", "resnet18") for s in ("", "_script")]
PAPER_VARIANTS = ["dpconv", "falcon_k1", "falcon_k1_unfitted", "falcon_k2", "falcon_k3", "gep_in"]


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.fixture(scope="module")
def shapes():
    """Models without arrays, with as many classes as the counts do not depend on."""
    made = {}

    def build(name):
        if name not in made:
            made[name] = nnx.eval_shape(
                lambda: get_model(name, num_classes=10, in_features=3, rngs=nnx.Rngs(0))
            )
        return made[name]

    return build


def convolutions(model):
    return [
        "/".join(map(str, path)) for path, node in nnx.iter_modules(model) if type(node) is nnx.Conv
    ]


@pytest.fixture(scope="module")
def replaced(shapes):
    """Say which layers a variant replaces; equal rules on equal models are planned once."""

    @functools.cache
    def paths(model, side, rules):
        sample = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        plan = make_plan(shapes(model), rules, sample, solver="random")
        return {row.path for row in plan.replaced}

    return lambda experiment, variant: paths(
        experiment.model.name, experiment.data.image_size, variant.rules
    )


def test_all_that_should_ship_do():
    expected = {
        f"{model}_{data}"
        for model in ("vgg19", "resnet34")
        for data in ("cifar10", "cifar100", "svhn", "fashion_mnist")
    }
    others = {"demo", "demo_searched", "torture", "vgg16_imagenet_decomposed"}
    assert set(NAMES) == expected | set(IMAGENET) | others


@pytest.mark.parametrize("name", NAMES)
def test_every_config_passes_the_check(name):
    experiment = check_config(load(name))
    assert experiment.compression.start == (
        f"runs/{experiment.model.name}" if name in IMAGENET else "train"
    )
    assert experiment.compression.chosen


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_how_to_run_it(name):
    doc = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert f"python train.py --config=configs/{name}.py --workdir=runs/" in doc
    for word in ("Machine", "Run time", "Expected"):
        assert re.search(rf"^{word}", doc, re.MULTILINE), f"{word} is missing"
    if load(name).data.source == "tfds":
        assert f"python -m falcon_jax prepare --name={load(name).data.name}\n" in doc


QUICK = ("demo",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_every_rule_matches_a_layer(name, replaced):
    experiment = check_config(load(name))
    for variant in experiment.compression.chosen:
        assert replaced(experiment, variant)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipe(name):
    experiment = check_config(load(name))
    fashion = name.endswith("fashion_mnist")
    for settings in (experiment.train, experiment.finetune):
        assert settings.optimizer == "sgd" and settings.momentum == 0.9 and not settings.nesterov
        assert settings.weight_decay == 1e-4
        assert settings.batch_size == 128
        assert settings.learning_rate == 0.1
        assert settings.schedule == "step" and settings.factor == 0.1
        assert settings.boundaries == ((15, 25) if fashion else (150, 250))
        assert settings.epochs == (30 if fashion else 350)
        assert settings.warmup_epochs == 0 and settings.label_smoothing == 0
    assert experiment.data.validation_fraction == 0.1
    assert experiment.data.source == ("idx" if fashion else "tfds")
    varied = not name.endswith("svhn")
    assert experiment.data.augmentation.crop_padding == (4 if varied else 0)
    assert experiment.data.augmentation.flip is varied


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_variants(name):
    experiment = check_config(load(name))
    assert [variant.name for variant in experiment.compression.chosen] == PAPER_VARIANTS
    methods = {variant.name: variant.method for variant in experiment.compression.chosen}
    for rank in (1, 2, 3):
        assert methods[f"falcon_k{rank}"] == get_method("falcon", rank=rank)
    assert methods["falcon_k1_unfitted"] == get_method("falcon", rank=1)
    assert methods["gep_in"] == methods["dpconv"] == get_method("depthwise_separable", rank=1)
    solvers = {variant.name: variant.solver for variant in experiment.compression.chosen}
    unfitted = {"falcon_k1_unfitted", "dpconv"}
    assert {n for n, solver in solvers.items() if solver == "random"} == unfitted
    assert {s for n, s in solvers.items() if n not in unfitted} == {"exact"}


@pytest.mark.parametrize("name", PAPER)
def test_adamw_is_one_flag_away_and_leaves_unfitted_ones_unfitted(name):
    config = load(name)
    config.compression.solver = "adamw"
    solvers = {variant.name: variant.solver for variant in check_config(config).compression.chosen}
    assert solvers["falcon_k2"] == solvers["gep_in"] == "adamw"
    assert solvers["falcon_k1_unfitted"] == solvers["dpconv"] == "random"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PAPER if n.startswith("vgg19")])
def test_vgg_loses_every_convolution_but_keeps_the_first_under_dpconv(name, shapes, replaced):
    experiment = check_config(load(name))
    every = set(convolutions(shapes("vgg19_cifar")))
    assert experiment.model.name == "vgg19_cifar" and len(every) == 16
    for variant in experiment.compression.chosen:
        kept = {"stages/0/0/conv"} if variant.name == "dpconv" else set()
        assert replaced(experiment, variant) == every - kept, variant.name


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PAPER if n.startswith("resnet34")])
def test_resnet_keeps_its_stem_and_shortcuts(name, shapes, replaced):
    experiment = check_config(load(name))
    every = set(convolutions(shapes("resnet34_cifar")))
    in_blocks = {path for path in every if re.fullmatch(r"stages/\d/\d/unit[12]/conv", path)}
    # A stem and four shortcuts; two convolutions in each of 3 + 4 + 6 + 3 blocks.
    assert experiment.model.name == "resnet34_cifar" and (len(every), len(in_blocks)) == (37, 32)
    for variant in experiment.compression.chosen:
        assert replaced(experiment, variant) == in_blocks, variant.name


def test_the_demo_keeps_the_first_convolution(shapes, replaced):
    experiment = check_config(load("demo"))
    every = set(convolutions(shapes(experiment.model.name)))
    for variant in experiment.compression.chosen:
        assert replaced(experiment, variant) == every - {"stages/0/0/conv"}


@pytest.mark.parametrize("name", IMAGENET)
def test_the_recipe_for_imagenet_is_the_papers_or_that_of_the_authors_script(name):
    experiment = check_config(load(name))
    script = name.endswith("_script")
    settings = experiment.finetune
    assert (settings.epochs, settings.momentum, settings.optimizer) == (90, 0.9, "sgd")
    assert settings.weight_decay == (0 if script else 1e-4)
    assert settings.batch_size == (96 if script else 128)
    assert settings.schedule == ("cosine" if script else "step")
    assert settings.boundaries == (30, 60)
    assert settings.learning_rate == 0.01
    assert f"--arch={experiment.model.name} " in (
        importlib.import_module(f"configs.{name}").__doc__
    )


@pytest.mark.parametrize(
    ("name", "params", "mult_adds"),
    [
        pytest.param(
            "vgg16_bn_imagenet",
            (125.33, 127.00, 128.68),
            (1950.75, 3777.86, 5604.97),
            marks=pytest.mark.slow,
        ),
        ("resnet18_imagenet", (1.97, 3.22, 4.48), (395.40, 653.00, 910.61)),
    ],
)
def test_imagenet_models_cost_what_the_paper_says(name, params, mult_adds):
    """In millions (Table 5), which counts no bias of a replaced layer as a mult-add."""
    experiment = check_config(load(name))
    model = model_shapes(experiment.model.name)
    sample = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    for variant, p, m in zip(experiment.compression.chosen, params, mult_adds, strict=True):
        plan = make_plan(model, variant.rules, sample, solver="random")
        paths = {row.path for row in plan.replaced}
        bias = sum(row.spec.use_bias * out_elements(row) for row in plan.rows if row.path in paths)
        assert plan.after.params / 1e6 == pytest.approx(p, abs=0.02)
        assert (plan.after.mult_adds - bias) / 1e6 == pytest.approx(m, abs=0.02)


def out_elements(row):
    """Output elements of a replaced layer: its mult-adds without bias per input and tap."""
    spec = row.spec
    before = row.before.mult_adds
    per_output = math.prod(spec.kernel_size) * spec.in_features + 1
    return before // per_output


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("nd", 8.61),
        ("cd_nd", 4.72),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("sd", 7.20), ("cd", 6.52), ("sd_nd", 4.15), ("cd_sd", 4.32))
        ),
    ],
)
def test_vgg16_costs_what_was_published(variant, published, shapes):
    """Mult-adds of the convolutions, in G (arXiv 1808.05517); 15.35 before."""
    experiment = check_config(load("vgg16_imagenet_decomposed"))
    rules = next(v.rules for v in experiment.compression.chosen if v.name == variant)
    sample = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    rows = make_plan(shapes("vgg16"), rules, sample, solver="random").rows
    assert sum(row.before.mult_adds for row in rows) == pytest.approx(15.35e9, rel=2e-3)
    assert sum(row.after.mult_adds for row in rows) == pytest.approx(published * 1e9, rel=0.02)
