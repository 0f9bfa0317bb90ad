"""What an error offers, tried on the job as it was given: nothing is named that would be refused next."""

from collections.abc import Callable, Iterator
from itertools import islice

from meshwright.spec.errors import Offer, SettingError, offers_text

# Ways out that an error names; settings that one of them may change; and offers that are tried for each such setting,
# which takes a fraction of a millisecond each.
SHOWN_OFFERS = 2
MOST_STEPS = 4
MOST_TRIED = 200

Refused = list[tuple[Offer, SettingError]]


def keep_working(error: SettingError, refusal: Callable[[Offer], SettingError | None]) -> SettingError:
    """The error with the nearest of each way out that works; with none, where none was found.

    refusal: of the job changed so; None where it is let through. Where no way works alone, the ways out of what refuses
    it are gone further: a job may have more than one fault.
    """
    found: list[Offer] = []
    refused: Refused = []
    for way in error.offers:
        works, others = first_working(iter(way), refusal)
        found += works
        refused += others
    for _ in range(MOST_STEPS - 1):
        if found or not refused:
            break
        found, refused = first_working(further(refused), refusal)
    nearest = offers_text(found[:SHOWN_OFFERS]) if error.offers else error.nearest
    return SettingError(error.setting, error.reason, nearest)


def first_working(
    offers: Iterator[Offer], refusal: Callable[[Offer], SettingError | None]
) -> tuple[list[Offer], Refused]:
    """The first offer that is let through, if one is, and why those before it are not."""
    refused: Refused = []
    for offer in islice(offers, MOST_TRIED):
        again = refusal(offer)
        if again is None:
            return [offer], refused
        refused.append((offer, again))
    return [], refused


def further(refused: Refused) -> Iterator[Offer]:
    """Each refused offer with what its refusal offers, unless that takes it back."""
    for offer, again in refused:
        yield from (offer | more for way in again.offers for more in way if not more.keys() & offer.keys())
