"""Read a finished or running run from its folder: reports, samples, exports."""
