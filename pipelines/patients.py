"""Patients of DICOM files as groups, under names that say nothing of them."""

import numpy as np

START = "patient-"


def named(
    groups: list[str],
    patients: np.ndarray,
    digests: np.ndarray,
    notes: list[str],
    *,
    overrule: bool,
    evaluation: bool,
) -> list[str]:
    """(N,) groups: those given, and one for each patient; "" where there is neither.

    A patient is called after the smallest digest of its files: whatever the order of the files, whoever else
    is among them, and without the identifier, which is not kept. One and the same identifier in all of a
    training set is taken for the dummy of a de-identified archive, and forms no group.

    Args:
        groups: (N,) names that the source gives, "" for none.
        patients: (N, 8) uint8 that tell patients apart; zeros for none.
        digests: (N, 32) uint8 SHA-256 of the files.
        notes: receives what a person should know.
        overrule: patients count more than given groups, else given groups more than patients.
        evaluation: the set is measured on, not split.
    """
    rows = [row for row in np.flatnonzero(patients.any(axis=1)).tolist() if overrule or not groups[row]]
    if not rows:
        return groups
    names: dict[bytes, str] = {}
    for row in rows:
        person, name = patients[row].tobytes(), digests[row].tobytes().hex()
        names[person] = min(name, names.get(person, name))
    if len(names) == 1 and len(rows) > 1 and not evaluation:
        notes.append(
            "All DICOM files name one patient, who is taken for a dummy: each image is its own group. "
            "A CSV with a column group says who is who."
        )
        return groups
    notes.append(f"Images of one patient form a group: {len(names):,} patients, by PatientID.")
    found = list(groups)
    for row in rows:
        found[row] = START + names[patients[row].tobytes()][:16]
    return found
