"""The patch engine: plan -> check -> apply -> log -> revert.

A patch is data, not an action. It says which attributes of which objects it would replace; the
engine collects all plans on the untouched model, refuses conflicts before anything has changed,
sets the attributes, and can put every one of them back. No patch contains revert code.

The record of what is applied lives on the model itself (`_applied_patches`), so that a deepcopy of
a patched model knows its patches and nothing outlives the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import NamedTuple

from packaging.requirements import Requirement
from torch import nn
from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger(__name__)

_RECORD = "_applied_patches"
_MISSING = object()


class PatchError(ValueError):
    """A patch cannot be applied or reverted; the message names it, the place and the remedy."""


class Replacement(NamedTuple):
    """One attribute to replace: `owner.attr = new`; `where` is the owner's name for messages."""

    owner: object
    attr: str
    new: object
    where: str


@dataclass(frozen=True, slots=True)
class Patch:
    """A reversible change to a loaded model.

    Attributes:
        name: what users write; unique.
        summary: one line for the log.
        requires: requirement specifiers such as "transformers>=5.23,<6".
        plan: yields the replacements for a model and changes nothing; raises PatchError when the
            model is of a kind the patch would get wrong.
        tolerance: allowed RMS(error) / RMS(unpatched) of loss and gradients in float32.
        upstream: the upstream code it relies on or stands in for.
        register: adds a name to an official transformers registry; idempotent. The entry is
            invisible until a config names it and is therefore never taken back.
    """

    name: str
    summary: str
    requires: tuple[str, ...]
    plan: Callable[[nn.Module], Iterator[Replacement]]
    tolerance: float
    upstream: str
    register: Callable[[], None] | None = None

    def unmet(self) -> list[str]:
        """Return the requirements that the installed packages do not meet, each with the reason."""
        unmet = []
        for requirement in map(Requirement, self.requires):
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                unmet.append(f"{requirement} (not installed)")
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                unmet.append(f"{requirement} (found {found})")
        return unmet


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class as its author wrote it.

    FSDP2 changes the class of a module to a subclass of its own, whose next base is the original.
    """
    kinds = type(module).__mro__
    return (kinds[2] if isinstance(module, FSDPModule) else kinds[0]).__name__


_Plans = dict[str, tuple[Replacement, ...]]


@dataclass(slots=True, repr=False)
class AppliedPatches:
    """What was applied to one model; a context manager that reverts on exit.

    Attributes:
        names: the patches in the order they were given.
        counts: replacements per patch.
    """

    names: tuple[str, ...]
    counts: dict[str, int]
    _model: nn.Module
    _undo: list[tuple[str, Replacement, object]] = field(default_factory=list)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {count}" for name, count in self.counts.items())
        state = "" if self._undo else ", reverted"
        return f"<patches of {type(self._model).__name__}: {counts}{state}>"

    def __enter__(self) -> AppliedPatches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.revert()

    def revert(self) -> None:
        """Put every replaced attribute back, last one first; a second call does nothing.

        Raises:
            PatchError: an attribute was changed after patching; nothing has been reverted then.
        """
        for _, replacement, _ in self._undo:
            if _own(replacement.owner, replacement.attr) is not replacement.new:
                raise PatchError(
                    f"{replacement.where}.{replacement.attr} was changed after patching; undo that "
                    f"change before reverting {', '.join(self.names)}"
                )
        if not self._undo:
            return
        while self._undo:
            _restore(*self._undo.pop()[1:])
        record = {n: p for n, p in vars(self._model)[_RECORD].items() if n not in self.names}
        setattr(self._model, _RECORD, record)

    @contextmanager
    def paused(self, *names: str) -> Iterator[None]:
        """Take some patches off for a while; the others stay, and these come back as they were.

        Args:
            *names: of patches; those that are not applied are ignored.
        """
        taken = [(r, old) for name, r, old in self._undo if name in names]
        for replacement, old in reversed(taken):
            _restore(replacement, old)
        try:
            yield
        finally:
            for replacement, _ in taken:
                setattr(replacement.owner, replacement.attr, replacement.new)


def apply_plans(model: nn.Module, patches: Sequence[Patch]) -> AppliedPatches:
    """Apply `patches` to `model`, all or none.

    Raises:
        PatchError: a requirement is unmet, a patch is already applied, a plan matches nothing or
            refuses the model, or two replacements conflict. The model is unchanged then.
    """
    plans = checked_plans(model, patches)
    for patch in patches:
        if patch.register is not None:
            patch.register()
    applied = AppliedPatches(tuple(plans), {n: len(p) for n, p in plans.items()}, model)
    with ExitStack() as undo:
        for name, replacement in ((n, r) for n, plan in plans.items() for r in plan):
            old = _own(replacement.owner, replacement.attr)
            setattr(replacement.owner, replacement.attr, replacement.new)
            undo.callback(_restore, replacement, old)
            applied._undo.append((name, replacement, old))
        undo.pop_all()
    setattr(model, _RECORD, vars(model).get(_RECORD, {}) | plans)
    for patch in patches:
        count = applied.counts[patch.name]
        logger.info("patch %s: %d replacements (%s)", patch.name, count, patch.summary)
    return applied


def checked_plans(model: nn.Module, patches: Sequence[Patch]) -> dict[str, tuple[Replacement, ...]]:
    """Return what each patch would replace; the model stays as it is.

    Raises:
        PatchError: as of `apply_plans`.
    """
    earlier: _Plans = {}
    for module in model.modules():
        earlier |= vars(module).get(_RECORD, {})
    plans: _Plans = {}
    for patch in patches:
        if patch.name in earlier | plans:
            raise PatchError(f"patch {patch.name!r} is already applied to this model")
        if unmet := patch.unmet():
            raise PatchError(f"patch {patch.name!r} needs {', '.join(unmet)}")
        plans[patch.name] = tuple(patch.plan(model))
        if not plans[patch.name]:
            raise PatchError(f"patch {patch.name!r} matches nothing in {type(model).__name__}")
    _refuse_conflicts(earlier, plans)
    return plans


def _refuse_conflicts(earlier: _Plans, plans: _Plans) -> None:
    """Refuse an attribute replaced twice, and a replacement inside a module that is replaced."""
    replaced: dict[int, str] = {}
    for name, plan in plans.items():
        for owner, attr, _, where in plan:
            if not hasattr(owner, attr):
                raise PatchError(f"patch {name!r}: {where} has no attribute {attr!r} to replace")
            old = _own(owner, attr)
            if isinstance(old, nn.Module):
                replaced |= {
                    id(module): f"{name!r} replaces {where}.{attr}" for module in old.modules()
                }
    claimed: dict[tuple[int, str], str] = {}
    for name, plan in (*earlier.items(), *plans.items()):
        for owner, attr, _, where in plan:
            if (id(owner), attr) in claimed:
                raise PatchError(
                    f"{claimed[id(owner), attr]!r} and {name!r} both replace {where}.{attr}"
                )
            if id(owner) in replaced:
                raise PatchError(f"{replaced[id(owner)]}, inside of which {name!r} replaces {attr}")
            claimed[id(owner), attr] = name


def _own(owner: object, attr: str) -> object:
    """Return what `owner` itself holds under `attr`, or _MISSING if only its class does."""
    stores = [vars(owner)]
    if isinstance(owner, nn.Module):
        stores += [owner._parameters, owner._buffers, owner._modules]
    for store in stores:
        if attr in store:
            return store[attr]
    is_property = isinstance(getattr(type(owner), attr, None), property)
    return getattr(owner, attr) if is_property else _MISSING


def _restore(replacement: Replacement, old: object) -> None:
    if old is _MISSING:
        delattr(replacement.owner, replacement.attr)
    else:
        setattr(replacement.owner, replacement.attr, old)
