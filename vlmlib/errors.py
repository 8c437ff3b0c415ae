"""What vlmlib raises when a picture, prompt, checkpoint or parameter is not what it must be.

All of it derives from `VlmError`. Each error also derives from the built-in a Python user would
expect (`ValueError`, `OSError`, ...), and says what is wrong, where, and what was expected.
A call that no input could make right, as one with an option that does not exist, raises the plain
`ValueError` or `TypeError`.
"""


class VlmError(Exception):
    """Base of every error that vlmlib raises on purpose."""


class ImageError(VlmError, ValueError):
    """A picture is missing, broken, or not a picture."""


class VideoError(VlmError, ValueError):
    """A video is missing, broken, or has not the frames asked for."""


class ShapeError(VlmError, ValueError):
    """Two sizes that must fit together do not."""


class PromptError(VlmError, ValueError):
    """The prompt is empty, or not what a tokenizer can read or the model knows."""


class PlaceholderError(VlmError, ValueError):
    """The number of media placeholders in the prompt is not the number of media."""


class ContextLengthError(VlmError, ValueError):
    """The prompt does not fit into the model's context."""


class GenParamsError(VlmError, ValueError):
    """A generation parameter has an impossible value."""


class CacheError(VlmError, ValueError):
    """The key/value cache is shorter than `start_pos`, or another model's or stream's; or a
    conversation went on while one of its answers was read.
    """


class CheckpointError(VlmError, OSError):
    """A checkpoint is missing, incomplete, or of a kind vlmlib does not know."""


class QuantizationError(VlmError, ValueError):
    """A model cannot be quantised as asked, or a description of four-bit weights not be followed;
    where that is a checkpoint's, it comes as a CheckpointError.
    """


class DeviceError(VlmError, ValueError):
    """The device is not on this machine, or not the one the model is on."""


class NonFiniteLogitsError(VlmError, ArithmeticError):
    """The model produced NaN or +infinity where scores were expected."""
