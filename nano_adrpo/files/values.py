"""Values made of dicts, lists, numbers, texts and tensors, as JSON and tensors with names: so a checkpoint's memory lies on
disk, and so ranks tell each other what they have."""

import torch


def split(value, name, tensors):
    """A value for JSON: of dicts, lists and named tuples, whose tensors go into the dict `tensors`, by names that begin with
    `name`. A tensor that comes twice is there once."""
    if torch.is_tensor(value):
        found = next((known for known, tensor in tensors.items() if tensor is value), name)
        tensors[found] = value
        return {"tensor": found}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): split(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [split(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def join(value, read):
    """The inverse of `split`, as far as JSON knows of it: keys are texts, and named tuples are dicts. read: name -> tensor."""
    if isinstance(value, list):
        return [join(item, read) for item in value]
    if isinstance(value, dict):
        return read(value["tensor"]) if value.keys() == {"tensor"} else {key: join(item, read) for key, item in value.items()}
    return value
