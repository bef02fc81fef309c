"""Training methods, one small file each. A config names one as `file:Class`, e.g. `lapo:Discovery`."""

from __future__ import annotations

import importlib
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
    try:
        if not file.isidentifier():
            raise ImportError(file)
        method_class = getattr(importlib.import_module(f"nanolapo.methods.{file}"), class_name)
    except (ImportError, AttributeError):
        raise UserError(
            f"method.name={config.method.name!r}: write it as file:Class, a class of nanolapo/methods/file.py, "
            "for example base:Method (accuracy only) or lapo:Discovery"
        ) from None
    return method_class(config)
