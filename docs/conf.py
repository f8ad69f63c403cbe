"""Settings of the documentation; `make docs` builds it."""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import falcon_jax  # noqa: E402

project = "falcon_jax"
author = "the falcon_jax authors"
copyright = "the falcon_jax authors; Apache-2.0"
release = falcon_jax.__version__
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "public_names",
]
# errors.md is for developers: every message, as the tests provoke it.
exclude_patterns = ["_build", "_ext", "errors.md", "**/.ipynb_checkpoints"]
default_role = "py:obj"  # docstrings name things of ours in single backticks
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures are shown as they are written, see _ext/public_names.py
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # types stand in the signature

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
# A child process of the build, which may run where another accelerator is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"falcon_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
