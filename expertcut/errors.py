"""Every error that a user can cause or meet, as one small tree; `cli` maps each branch to an exit code."""


class ExpertcutError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback.

    `message` says what is wrong and where (file, tensor, layer), found against expected.
    `hint` names the next step, usually a command; it is printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ExpertcutError):
    """Options that do not go together, or a value out of range."""


class DestinationError(ExpertcutError):
    """The place to write to exists, lacks space, or cannot be written."""


class CheckpointError(ExpertcutError):
    """A checkpoint that cannot be read, or that contradicts itself."""


class UnknownTensorError(CheckpointError):
    """A tensor with an expert-sized axis that no rule of the family explains, or a family without a row."""


class ConfigConflictError(CheckpointError):
    """The config contradicts itself or the tensors."""


class ProfileError(ExpertcutError):
    """A profile that is damaged, incomplete, or made from another model."""


class DataError(ExpertcutError):
    """Calibration or held-out text that cannot be read or does not suffice."""


class PlanError(ExpertcutError):
    """A plan that is invalid, impossible, or made for another model."""


class VerifyError(ExpertcutError):
    """A written checkpoint that fails a check."""


class GateError(ExpertcutError):
    """A quality limit that a plan does not meet."""


class RuntimeLintError(ExpertcutError):
    """A runtime that is missing, unsupported, or refuses the checkpoint."""


class HubError(ExpertcutError):
    """The Hub, or the way there, failed."""
