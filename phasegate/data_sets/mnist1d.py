"""Generate MNIST-1D (Greydanus & Kobak 2024, arXiv 2011.14439) offline, and check it against the published file."""

import random
from pathlib import Path

import numpy as np

from phasegate.base.errors import UserError
from phasegate.base.files import sha256
from phasegate.data_sets.raw import Raw
from phasegate.records.prepared import Split

SHA256 = {  # of the float32 bytes, labels too; the validation arrays are ours, the others as published
    "x": "d53506bddd12d3b72c7153b1ae7f34807724b1dd078a7273809bf9d0792319f6",
    "y": "421e66a35fdb5322f6546df2bcb7ebe19575203e49ddb3bfa315ecf707f4b709",
    "x_test": "30addc43827c82aafa5db8bc97cea63349ca687e87db2f201cc4f5415d9a4ebd",
    "y_test": "d822b797eaf5df83aa5b69ae97285cd35dfa54c2f9a0287e03f56cb0f8874f07",
    "x_validation": "8cdb3d76001734c597cbdd1ed47147267b148f7fd71eda58ef2e3f3f84d313e6",
    "y_validation": "ca1ed95fb0c6f3828fe83b6191452d5409314d3a433e749e157235e69bebb0e6",
}
VALIDATION = {"seed": 43, "num_samples": 2000, "train_split": 1.0}  # the published data set has seed 42


def load(_: Path | None = None) -> Raw:
    """Generate the published 4,000 train and 1,000 test examples, x (N, 1, 40), and 2,000 others for validation."""
    from mnist1d import data as mnist1d  # type: ignore[import-untyped, unused-ignore]  # late: imports matplotlib

    python_state, numpy_state = random.getstate(), np.random.get_state()  # mnist1d seeds the global generators
    try:
        arrays = mnist1d.make_dataset()
        fresh = mnist1d.make_dataset(mnist1d.ObjectView(mnist1d.get_dataset_args(as_dict=True) | VALIDATION))
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    arrays |= {"x_validation": fresh["x"], "y_validation": fresh["y"]}
    for name, expected in SHA256.items():
        arrays[name] = np.ascontiguousarray(arrays[name], np.float32)
        if (found := sha256(arrays[name].data)) != expected:
            raise UserError(f"mnist1d made {name} with sha256 {found}, not {expected}: install the locked versions")

    def split(suffix: str) -> Split:
        return Split(arrays[f"x{suffix}"][:, None], arrays[f"y{suffix}"].astype(np.int64))

    return Raw(split(""), split("_test"), split("_validation"), tuple("0123456789"), standardise=False)
