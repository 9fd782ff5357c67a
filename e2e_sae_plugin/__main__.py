"""`python -m e2e_sae_plugin` is `e2e-sae`."""

import sys

from e2e_sae_plugin.cli import main

sys.exit(main())
