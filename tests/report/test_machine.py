import os
import platform

import jax

from falcon_jax.report.table import describe_machine


def test_says_what_this_machine_is():
    machine = describe_machine()
    assert set(machine) == {"cpu", "cores", "devices", "python", "jax", "numpy"}
    assert all(machine.values())
    assert machine["python"] == platform.python_version()
    assert machine["jax"] == jax.__version__
    assert machine["devices"] == "8 x cpu"
    assert 1 <= machine["cores"] <= (os.cpu_count() or 1)
