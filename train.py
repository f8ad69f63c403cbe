"""Train, compress and fine-tune a network as a config file says.

python train.py --config=configs/demo.py --workdir=runs/demo [--config.some.field=value ...]
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from falcon_jax.training.config import check_config
from falcon_jax.training.experiment import run_experiment
from falcon_jax.training.workdir import claim_workdir

BAD_INPUT = 2


def main(arguments: Sequence[str]) -> int:
    """Run the experiment that the command line describes.

    Args:
        arguments: the program's name and its flags.

    Returns:
        The exit status: 0, or 2 after bad input, told in one line on stderr.
    """
    values = flags.FlagValues()
    workdir = flags.DEFINE_string(
        "workdir", None, "folder of checkpoints, logs and the report", flag_values=values
    )
    config = config_flags.DEFINE_config_file(
        "config", None, "config file, e.g. configs/demo.py", flag_values=values
    )
    app.define_help_flags()
    try:
        unknown = values(list(arguments))[1:]
        if unknown:
            raise ValueError(f"unexpected argument {unknown[0]!r}")
        if config.value is None or workdir.value is None:
            raise ValueError("give --config=FILE and --workdir=FOLDER")
        experiment = check_config(config.value)
        folder = pathlib.Path(workdir.value)
        claim_workdir(folder, config.value.to_dict())
        _, table = run_experiment(experiment, folder)
    except (
        flags.Error,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        OSError,
        ImportError,
    ) as e:
        print(f"train.py: error: {' '.join(str(e).split())}", file=sys.stderr)
        return BAD_INPUT
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
