import os
BACKEND = os.environ.get("MOE_EXT_BACKEND", "reference")
