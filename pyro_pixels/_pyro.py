"""What the package does to Pyro's parameter messages."""

import weakref

from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import nn


def announce_parameters(prefix: str, module: nn.Module) -> None:
    """Tells Pyro which parameters a program has, so that ``pyro.infer.SVI`` trains them; nothing is stored globally.

    `pyro.module` would do so through the one parameter store of the process, where models of equal names share values.
    """
    if am_i_wrapped():
        for name, parameter in module.named_parameters(prefix):
            alias = parameter.detach()
            alias.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]  # what SVI asks of a param site
            effectful(lambda _name, value=alias: value, type="param")(name, name=name)
