"""No spec grows into a god-config: at most 12 fields, counted (CONTRIBUTING.md, "House style")."""

import dataclasses
import importlib
import pkgutil

import pytest

import lamina


def everything(cls: type) -> list[type]:
    return [cls, *(below for child in cls.__subclasses__() for below in everything(child))]


def specs() -> list[type]:
    Spec = pytest.importorskip("lamina.specs").Spec
    for module in pkgutil.walk_packages(lamina.__path__, "lamina."):
        if not module.name.endswith("__main__") and module.name.split(".")[1] != "harness":  # needs an extra
            importlib.import_module(module.name)
    ours = [cls for cls in everything(Spec) if cls.__module__.startswith("lamina.")]
    return [cls for cls in ours if not cls.__subclasses__() or "__dataclass_params__" in vars(cls)]  # no abstract bases


def test_specs_have_at_most_12_fields_and_cannot_be_changed():
    found = specs()
    assert len(found) > 1
    for cls in found:
        fields = [field.name for field in dataclasses.fields(cls)]
        assert len(fields) <= 12, f"{cls.__qualname__} has {len(fields)} fields: {fields}"
        assert cls.__dataclass_params__.frozen, f"{cls.__qualname__} is not frozen"


def test_what_a_forward_carries_has_at_most_8_fields():
    Call = pytest.importorskip("lamina.layers.call").Call
    names = [field.name for field in dataclasses.fields(Call)] if dataclasses.is_dataclass(Call) else Call.__slots__
    assert len(names) <= 8, names
