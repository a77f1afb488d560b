"""From a contract and a party file to what `join`, `serve`, `connect` and `predict` take.

```python
site = cl.load_site(Path("contract.toml"), Path("hospital-a.toml"))
result = cl.join(site.plan, site.party, network=site.network, folder=Path("runs/our-study"))
```
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cutlayer.core.plan import Plan
from cutlayer.core.quota import Serving
from cutlayer.run.config import load_contract
from cutlayer.run.launch import accept, network_settings
from cutlayer.run.party import Party
from cutlayer.run.partyfile import load_party_file
from cutlayer.transport.settings import NetworkSettings

__all__ = ["LocalSite", "load_site"]


@dataclass(frozen=True)
class LocalSite:
    """What one site takes part with.

    Attributes:
        plan: The contract's.
        party: What the party file's builder gave.
        network: Addresses, certificate and deadlines; its digest is the contract's, as with the command line.
        serving: Limits and quotas of a served stage, for `cutlayer.serve`.
    """

    plan: Plan
    party: Party
    network: NetworkSettings
    serving: Serving


def load_site(contract: Path, party_file: Path) -> LocalSite:
    """Read a contract and a party file, and call the file's builder, as `cutlayer join` and `serve` do.

    Nothing is sent, and nobody is asked: `print(site.plan)` says what may leave. A party file that names the digest of
    the contract that its site has accepted (`run.accept`) is held to it.

    Args:
        contract: The contract, the same at all parties.
        party_file: This site's own file; paths in it count from its folder.

    Raises:
        ConfigError: E201 to E206, E211 to E214, a file or what it says is wrong, or its builder fails; E207, this site
            has accepted another contract.
        PlanError: The plan in the contract cannot be run.
        CertificateError: E666, a file of the certificate is missing or damaged.
    """
    agreed, file = load_contract(contract), load_party_file(party_file)
    network = network_settings(agreed, file)
    accept(agreed, file, "")
    return LocalSite(agreed.plan, file.party(), network, file.serving)
