"""What a run means for the next one, in words. Each sentence contains the numbers that it follows from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.tracking.report.influence import Influence, influence
from clantune_scale.tracking.report.schedule import rates
from clantune_scale.tracking.report.series import Run


def outcome(run: Run) -> list[str]:
    """How far the run got, and its result."""
    total = run.start.get("total_steps")
    steps = f"{run.num_steps:,} of {total:,}" if total else f"{run.num_steps:,}"
    state = _STATES.get(run.end["status"] if run.end else None, "ended with an unknown status")
    sentences = [f"The run {state} after {steps} steps in {_count(run.num_rounds, 'round')}."]
    loss, first = run.loss[-1, run.best], run.start.get("initial_loss")
    began = f", from {first:.4f} before the first step" if first is not None else ""
    title = (
        "The champion, "
        if run.end is not None and run.end.get("champion") is not None
        else "The fittest member so far, "
    )
    if np.isfinite(loss):
        sentences.append(f"{title}member {run.best}, has a validation loss of {loss:.4f} in the last round{began}.")
    if run.samples:
        tokens = f" ({run.tokens:,} tokens)" if run.tokens else ""
        sentences.append(f"The clan trained on {run.samples:,} samples{tokens}.")
    return sentences


def of_gene(run: Run, gene: Gene) -> list[str]:
    """How a gene moved, whether it mattered, and what that suggests."""
    told = influence(run, gene)
    return [*_movement(gene, told), *_effect(run, gene, told), *_bounds(gene, told), *_ending(run, gene, told)]


def health(run: Run) -> list[str]:
    """Rollbacks, overfitting, non-finite losses, stragglers, the clan's cost, and warnings."""
    return [*_restores(run), *_overfitting(run), *_nonfinite(run), *_stragglers(run), *_cost(run), *_warnings(run)]


def next_run(run: Run) -> list[str]:
    """What to set in the next run's config."""
    sentences = []
    for gene in run.genes:
        told = influence(run, gene)
        if told.explained is not None and not told.is_clear:
            sentences.append(
                f"Remove {gene.name} from `genes`, use longer rounds, or raise `fitness.num_samples`: with these "
                f"settings its effect on the loss is not clear."
            )
        elif gene.relative:
            sentences.append(f"Multiply your own {gene.target} by {told.last:.3g}, the last factor of {gene.name}.")
        else:
            sentences.append(f"Set `initial` of {gene.name} to {told.last:.4g} instead of {gene.initial:.4g}.")
    pair = rates(run)
    if pair is not None and np.isfinite(pair[1]).all() and (pair[1] > 0).all():
        ratio = float(np.max(pair[0]) / np.max(pair[1]))
        sentences.append(
            f"The highest learning rate at a round's end was {np.max(pair[0]):.3g}, {ratio:.3g} times that of your own "
            f"schedule."
        )
    if run.restored.sum() > 1:
        sentences.append("Lower `max_change` of the gene that was moving when the clan was rolled back.")
    return sentences


def _movement(gene: Gene, told: Influence) -> Iterator[str]:
    factor = f", a factor of {told.last / told.first:.3g}" if gene.scale == "log" else ""
    yield f"It changed from {told.first:.4g} to {told.last:.4g}{factor}."
    net = abs(gene.encode(told.last) - gene.encode(told.first))
    if told.path > 4 * max(net, 1e-12) and told.path > 2 * gene.step_size:
        yield f"It wandered: all its changes add up to {told.path:.3g} scale units, its net change to {net:.2g}."
    elif told.path <= gene.step_size:
        yield (
            f"It hardly moved: its changes add up to {told.path:.2g} scale units; its initial step size was "
            f"{gene.step_size:.2g}."
        )
    capped = int((np.abs(told.moves) >= 0.95 * gene.max_change).sum())
    if capped:
        yield (
            f"In {capped} of {_count(len(told.moves), 'decision')} it changed by the limit, `max_change` "
            f"({gene.max_change:g})."
        )


def _effect(run: Run, gene: Gene, told: Influence) -> Iterator[str]:
    if told.explained is None:
        members, rounds = _count(run.num_members, "member"), _count(run.num_rounds, "round")
        yield f"{members} and {rounds} are too few to tell whether it mattered."
        return
    chance = f"chance gives {told.chance:.0%} with {run.num_members} members"
    share = f"it explains {told.explained:.0%} of the differences in loss between members"
    if told.is_clear:
        shared = " Genes that are copied together share the credit." if len(run.genes) > 1 else ""
        yield f"It mattered: {share} ({chance}).{shared}"
    else:
        yield f"No clear effect: {share}, near chance ({chance}). A gene at its optimum shows none either."


def _bounds(gene: Gene, told: Influence) -> Iterator[str]:
    for share, bound, where in ((told.at_low, gene.bounds[0], "lower"), (told.at_high, gene.bounds[1], "upper")):
        if share > 0:
            yield f"It was at its {where} bound {bound:g} in {_percent(share)} of the members' rounds: widen the bound."


def _ending(run: Run, gene: Gene, told: Influence) -> Iterator[str]:
    if len(told.moves) < 3:
        return
    frozen = run.frozen_round
    when = f"when genes froze at step {run.start_steps[frozen]:,}" if frozen is not None else "in the last round"
    last = told.moves[-3:]
    turns = bool((np.sign(last[1:]) != np.sign(last[:-1])).all())
    if turns and np.abs(last).min() > 0.5 * gene.max_change:
        yield (
            f"It oscillated {when}, by {np.abs(last).mean():.2g} a round: the optimum lies between. Lower `max_change` "
            f"or raise `fitness.num_samples`."
        )
    elif abs(last[-1]) > max(2 * gene.step_size, 0.25 * gene.max_change):
        yield f"It was still moving {when} (by {last[-1]:+.2g} in the last decision): it has not converged."
    else:
        yield f"It had converged {when} (last decision {last[-1]:+.2g})."


def _restores(run: Run) -> Iterator[str]:
    count = int(run.restored.sum())
    if not count:
        yield "The clan was never rolled back."
        return
    lost = int((run.end_steps - run.start_steps)[run.undone].sum())
    steps = ", ".join(f"{step:,}" for step in run.end_steps[run.restored][:8])
    more = ", and later" if count > 8 else ""
    yield (
        f"The clan was rolled back {_count(count, 'time')} (at steps {steps}{more}). The training of "
        f"{_count(lost, 'step')} was discarded."
    )


def _overfitting(run: Run) -> Iterator[str]:
    if run.overfitting:
        steps = ", ".join(f"{step:,}" for step in run.overfitting[:4])
        more = ", and later" if len(run.overfitting) > 4 else ""
        yield (
            f"In {_count(len(run.overfitting), 'round')} the validation loss did not follow the training loss (at "
            f"steps {steps}{more}). The model overfits, and learning rates were held. More data, dropout or a shorter "
            f"run will help more than another schedule."
        )


def _nonfinite(run: Run) -> Iterator[str]:
    by_member = np.nansum(run.measured["strikes"], axis=0)
    lost = (~np.isfinite(run.loss)).sum(axis=0)
    if by_member.any():
        worst = ", ".join(
            f"member {member}: {int(by_member[member])}" for member in np.argsort(-by_member)[:4] if by_member[member]
        )
        yield f"{int(by_member.sum())} micro-batches had a non-finite loss ({worst})."
    if lost.any():
        yield (
            f"{_count(int(lost.sum()), 'evaluation')} gave a non-finite loss (member {int(np.argmax(lost))} "
            f"most often): some gene values make training diverge."
        )


def _stragglers(run: Run) -> Iterator[str]:
    if not run.stragglers:
        return
    members = [member for _, member, _ in run.stragglers]
    member = max(set(members), key=members.count)
    seconds = sum(late for *_, late in run.stragglers)
    yield (
        f"In {_count(len(members), 'round')} the other members waited for one, most often member {member} "
        f"({members.count(member)} times); {seconds:.1f} s in all."
    )


def _cost(run: Run) -> Iterator[str]:
    totals = {part: float(np.nansum(seconds)) for part, seconds in run.seconds.items()}
    whole = sum(totals.values())
    if whole:
        overhead = totals.get("evaluation", 0.0) + totals.get("transfer", 0.0)
        yield f"Evaluation and transfer took {overhead / whole:.1%} of {_duration(whole)}."
    for kind, (samples, tokens, seconds) in run.throughput.items():
        if seconds and np.isfinite(samples):
            of_tokens = f", {tokens / seconds:,.0f} tokens/s" if np.isfinite(tokens) else ""
            yield f"Throughput in {kind} phases: {samples / seconds:,.0f} samples/s{of_tokens}."


def _warnings(run: Run) -> Iterator[str]:
    for step, message in run.warnings[:10]:
        yield f"Warning at step {step:,}: {message}"
    if len(run.warnings) > 10:
        yield f"{len(run.warnings) - 10:,} more warnings are in the events file."


_STATES = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "was killed",
    None: "goes on, or died silently,",
}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1 %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
