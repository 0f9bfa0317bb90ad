"""Between which ranks a message goes that its kernel does not name: what was said when it was launched tells, or the
program's size."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from meshwright.record.kineto.purposes import Sent, kind_of
from meshwright.record.kineto.trace import Event

# NCCL's kernel SendRecv serves all-to-all too, which says what it is; other messages may go by no name at all.
PLAIN = "send"
MESSAGES = ("send", "recv")

# Bytes of an element, by the names that NCCL's kernels have for types in a trace.
ELEMENT_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "Float8_e4m3fn", "Float8_e5m2"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
}

# By name: description and ranks.
Groups = Mapping[str, tuple[str, tuple[int, ...]]]


def with_peers(sent: Sequence[Sent], records: Sequence[Event], groups: Groups, rank: int) -> list[Sent]:
    """A step's transfers, those of them that are messages with the two ranks that they go between, where that is known.

    Messages that are launched as one (a batch of isend and irecv) are one kernel, and each was noted before that kernel
    was launched. records: such notes, of collectives too. rank: whose trace it is, -1 where that is not known. Of two
    ranks the how manieth a message is in the step tells which two meet: NCCL keeps their order. One that goes between
    more ranks than two, or nobody knows which, meets none, and the wait for it cannot be told from it.
    """
    everybody = max((ranks for _, ranks in groups.values()), key=len, default=())
    notes = sorted((e for e in records if kind_of(e.args.collective) in MESSAGES), key=lambda e: e.start_s)
    starts = [note.start_s for note in notes]
    count: Counter[tuple[int, ...]] = Counter()
    found: dict[int, Sent] = {}
    told = 0
    for at in sorted(range(len(sent)), key=lambda at: sent[at].launch_s):
        one = sent[at]
        if one.kind not in MESSAGES or one.ends is not None:
            continue
        behind = bisect_right(starts, one.launch_s)
        own, told = notes[told:behind], behind
        one = with_notes(one, own, groups)
        ends = {end for note in own for end in ends_of(note, one.ranks, rank)}
        meeting = one.ranks if len(one.ranks) == 2 else everybody if len(everybody) == 2 else ()
        ranks = tuple(sorted(ends)) if len(ends) == 2 and rank >= 0 else () if len(ends) > 2 else meeting
        count[ranks] += 1
        found[at] = msgspec.structs.replace(one, ranks=ranks, number=count[ranks])
    return [found.get(at, one) for at, one in enumerate(sent)]


def with_notes(one: Sent, notes: Sequence[Event], groups: Groups) -> Sent:
    """A message with what the notes of its parts say of its group, and of what this rank sent."""
    if not notes:
        return one
    args = notes[-1].args
    description, ranks = groups.get(args.group, ("", ()))
    sizes = [
        0 if kind_of(note.args.collective) == "recv" else note.args.elements * ELEMENT_BYTES.get(note.args.dtype, 0)
        for note in notes
    ]
    known = all(size > 0 or kind_of(note.args.collective) == "recv" for size, note in zip(sizes, notes, strict=True))
    return msgspec.structs.replace(
        one,
        group=one.group or args.group,
        description=one.description or args.description or description,
        ranks=one.ranks or args.ranks or ranks,
        sent_bytes=float(sum(sizes)) if known and one.sent_bytes is None else one.sent_bytes,
    )


def ends_of(note: Event, ranks: Sequence[int], rank: int) -> tuple[int, ...]:
    """This rank and the one that a note names, which counts ranks within its group; nothing where it names none."""
    peer = note.args.target if kind_of(note.args.collective) == "send" else note.args.source
    return (rank, ranks[peer] if ranks else peer) if 0 <= peer < (len(ranks) or peer + 1) else ()
