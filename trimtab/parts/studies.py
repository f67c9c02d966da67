"""Searches of other libraries behind our verb: what a library knows is made again from the trials at each ask."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Hunt, Trial
from trimtab.parts.breeding import Known


def library(name: str, module: str = "") -> Any:
    """A module of a package that the extra `search` installs; the package itself where none is named.

    Raises:
        UserError: the package is not installed.
    """
    try:
        found = importlib.import_module(name)
        return importlib.import_module(f"{name}.{module}") if module else found
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"a searcher of {name} was asked for, and {name} is not installed: pip install 'trimtab[search]'"
        ) from None


def broken(hunt: Hunt, trial: Trial) -> dict[str, float]:
    """By which share of each limit a trial is above it; at most 0 where the limit is met."""
    return {name: (trial.values[name] - limit) / max(abs(limit), 1e-12) for name, limit in hunt.limits.items()}


class Study:
    """A study of Optuna that has been told all whole trials of a hunt, and of those that are under way.

    Args:
        hunt: the search.
        sampler: of Optuna; one that counts generations has them counted again, trial by trial.
    """

    def __init__(self, hunt: Hunt, sampler: Any) -> None:
        self._optuna, self._hunt, self._sampler = library("optuna"), hunt, sampler
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self._study = self._optuna.create_study(directions=["minimize"] * len(hunt.objectives), sampler=sampler)
        self._told = {trial.genome: trial for trial in hunt.trials if trial.effort >= 1}
        for trial in self._told.values():
            if hasattr(sampler, "get_trial_generation"):
                self._tell(self._again(trial.genome), trial)
            else:
                self._study.add_trial(self._whole(trial))
        for genome in hunt.pending:
            self._again(genome)

    def _params(self, genome: Genome) -> dict[str, int]:
        domain = self._hunt.domain
        pairs = zip(domain.knobs, genome, domain.active(genome), strict=True)
        return {knob.name: place for knob, place, on in pairs if on}

    def _values(self, trial: Trial) -> list[float]:
        return [trial.values[name] for name in self._hunt.objectives]

    def _whole(self, trial: Trial) -> Any:
        params, kinds = self._params(trial.genome), self._optuna.distributions
        distributions = {
            knob.name: kinds.IntDistribution(0, len(knob.options) - 1)
            if knob.ordered
            else kinds.CategoricalDistribution(tuple(range(len(knob.options))))
            for knob in self._hunt.domain.knobs
            if knob.name in params
        }
        return self._optuna.trial.create_trial(
            params=params,
            distributions=distributions,
            values=self._values(trial),
            constraints=broken(self._hunt, trial),
        )

    def _again(self, genome: Genome) -> Any:
        """A genome under way, as though the library had proposed it now."""
        self._study.enqueue_trial(self._params(genome))
        trial = self._study.ask()
        if hasattr(self._sampler, "get_trial_generation"):  # which a trial with given places does not ask for
            self._sampler.get_trial_generation(self._study, self._study.get_trials(deepcopy=False)[-1])
        self._suggested(trial)
        return trial

    def _tell(self, asked: Any, trial: Trial) -> None:
        for name, over in broken(self._hunt, trial).items():
            asked.set_constraint(name, over)
        self._study.tell(asked, self._values(trial))

    def _suggested(self, trial: Any) -> Genome:
        """The places that the library says, knob by knob, of those that matter."""
        domain, places = self._hunt.domain, [0] * len(self._hunt.domain.knobs)
        for i, knob in enumerate(domain.knobs):
            last = len(knob.options) - 1
            if not domain.active(tuple(places))[i]:
                continue
            if knob.ordered:
                places[i] = trial.suggest_int(knob.name, 0, last)
            else:
                places[i] = trial.suggest_categorical(knob.name, tuple(range(last + 1)))
        return tuple(places)

    def _propose(self) -> Genome:
        """What the library proposes next; of a trial's genome it is told the values once more."""
        asked = self._study.ask()
        genome = self._suggested(asked)
        if same := self._told.get(genome):
            self._tell(asked, same)
        return genome

    def ask(self, known: Known, count: int, otherwise: Callable[[], Genome]) -> list[Genome]:
        """At most `count` new genomes; where the library repeats itself, others."""
        found = known.taken(self._propose, count)
        return found + known.taken(otherwise, count - len(found))
