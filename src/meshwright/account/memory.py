"""The memory account: what one rank's device memory holds at its peak."""

from meshwright.account.base import Account


class MemoryAccount(Account, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes per rank at the step's peak.

    framework: the device context, communication library and process outside the model. fragmentation: reserved by
    the allocator and not in use. communication_buffers: gathered parameters and reduction inputs in flight.
    """

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer_states: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    communication_buffers: float = 0.0
    framework: float = 0.0
    fragmentation: float = 0.0
