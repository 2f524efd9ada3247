"""Files of `torch.save` made by hand, byte by byte, without PyTorch."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np


class Stub:
    """Pickles as a reference to module.name, without importing it."""

    def __init__(self, module, name):
        self.reference = module, name


class Pickler(pickle._Pickler):  # the one written in Python: it can name what is not importable
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Stub):
            self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.reference).encode())
        elif isinstance(obj, Tensor):
            self.save(Stub("torch._utils", "_rebuild_tensor_v2"))
            self.write(pickle.MARK)
            for item in (
                ("storage", Stub("torch", obj.kind + "Storage"), obj.key, "cpu", obj.count),
            ):
                self.save(item)
                self.write(pickle.BINPERSID)
            for item in (obj.offset, obj.shape, obj.strides, False, OrderedDict()):
                self.save(item)
            self.write(pickle.TUPLE + pickle.REDUCE)
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Tensor:
    def __init__(self, key, count, shape, strides=None, offset=0, kind="Float"):
        self.key, self.count, self.shape, self.kind, self.offset = key, count, shape, kind, offset
        steps = np.cumprod([1, *shape[:0:-1]])[::-1].tolist() if shape else []
        self.strides = tuple(steps) if strides is None else strides


def program(value, protocol=2):
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def write_zip(path, value, storages, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", value if isinstance(value, bytes) else program(value))
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_legacy(path, value, storages):
    with path.open("wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, 2)
        pickle.dump(1001, file, 2)
        pickle.dump({"protocol_version": 1001, "little_endian": True}, file, 2)
        file.write(value if isinstance(value, bytes) else program(value))
        pickle.dump(list(storages), file, 2)
        for data in storages.values():
            file.write(struct.pack("<q", len(data) // 4) + data)
    return path


def write_state_dict(path, arrays):
    """float32 arrays by name, as `torch.save(model.state_dict(), path)` has them."""
    tensors = OrderedDict(
        (key, Tensor(str(i), a.size, a.shape)) for i, (key, a) in enumerate(arrays.items())
    )
    storages = {str(i): np.ascontiguousarray(a).tobytes() for i, a in enumerate(arrays.values())}
    return write_zip(path, tensors, storages)
