"""Training methods, one small file each. A config names one as `file:Class`, e.g. `lapo:Discovery`."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from nanolapo.config import Config, UserError
from nanolapo.methods.base import Method


def load_method(config: Config, default: type[Method] | None = None) -> Method:
    """Build the method that `method.name` names, or `default` where it is empty. Raises UserError for an unknown class.

    The name of the default is written into the method's config, so that config.yaml says which class was trained.

    >>> load_method(Config(), Method).config.method.name
    'base:Method'
    """
    if default and not config.method.name:
        name = f"{default.__module__.rpartition('.')[2]}:{default.__name__}"
        config = replace(config, method=replace(config.method, name=name))
    file, _, class_name = config.method.name.partition(":")
    module = f"nanolapo.methods.{file}"
    exists = file.isidentifier() and importlib.util.find_spec(module) is not None
    # If the file itself is wrong, the error and its traceback go to the user as they are.
    here = vars(importlib.import_module(module)) if exists else {}
    types = {name: found for name, found in here.items() if isinstance(found, type) and found.__module__ == module}
    classes = [name for name, found in types.items() if issubclass(found, Method)]
    if class_name not in classes:
        wrong = "write it as file:Class, a class of nanolapo/methods/file.py, for example base:Method (accuracy only)"
        if exists:
            wrong = f"write it as file:Class; in nanolapo/methods/{file}.py there is {', '.join(classes) or 'none'}"
        raise UserError(f"method.name={config.method.name!r}: {wrong}")
    method: Method = here[class_name](config)
    return method
