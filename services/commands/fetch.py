"""`python -m prfaas.services.commands.fetch MODEL`: put a model into the cache, print its directory (for make)."""

from __future__ import annotations

import sys

from prfaas.common.errors import PrfaasError
from prfaas.services.commands.flags import complain
from prfaas.services.commands.progress import progress_bar
from prfaas.services.model_store import ensure_model


def main(names: list[str]) -> int:
    try:
        with progress_bar() as progress:
            directories = [ensure_model(name, progress) for name in names]
    except PrfaasError as error:
        complain("fetch", [str(error)])
        return 1
    for directory in directories:
        print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
