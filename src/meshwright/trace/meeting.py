"""How the ranks of another program agree, without a collective of ours in it: through the store by which they met."""

from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.elastic.utils import get_env_variable_or_raise

from meshwright.spec import SettingError

# Ranks may reach record() minutes apart: one of them may have prepared the data.
MEETING_S = 1800.0


class Meeting:
    """What the ranks of one record() tell each other. Words are kept under a number that all of them count alike.

    Only record() waits; everything afterwards looks whether a word is there. A connection of its own keeps the
    program's use of the store (which communicators are made through) from ever queueing behind ours.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self._store: dist.Store | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        elif (launched := launched_ranks()) > 1:
            raise SettingError(
                "record()",
                f"is called before init_process_group, so that each of {launched} ranks would record a run of its own",
                "record() after torch.distributed.init_process_group()",
            )
        if self.world_size > 1:
            # There since torch 2.6; its type stubs do not know it.
            store = cast(Any, dist.distributed_c10d._get_default_store()).clone()
            number = store.add(f"meshwright/calls/{self.rank}", 1)
            self._store = dist.PrefixStore(f"meshwright/{number}", store)

    def tell(self, key: str, word: str) -> None:
        """Say something to all ranks."""
        if self._store is not None:
            self._store.set(key, word)

    def told(self, key: str) -> str | None:
        """What was said, or None as long as nothing was."""
        if self._store is None or not self._store.check([key]):
            return None
        return self._store.get(key).decode()

    def wait(self, key: str) -> str:
        """What rank 0 says; raises RuntimeError where it does not for long."""
        assert self._store is not None
        self._store.wait([key], timedelta(seconds=MEETING_S))
        return self._store.get(key).decode()


def launched_ranks() -> int:
    """How many ranks the launcher has started, by the variable in which it says so; 1 where there is none."""
    try:
        return int(get_env_variable_or_raise("WORLD_SIZE"))
    except ValueError:
        return 1
