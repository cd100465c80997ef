"""What every package uses: number checks, files, optional imports, progress bars, registries."""
