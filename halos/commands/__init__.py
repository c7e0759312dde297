"""The commands of halos, one file each (those in ``halos.cli.COMMANDS``), and what they share."""
