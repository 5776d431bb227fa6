"""Pure functions of tensors: normalizers, selection, distances."""
