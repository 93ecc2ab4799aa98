"""Commands of the command line besides LightningCLI's."""
