"""What a hypervisor has, as an answer that always comes: one that cannot be asked is an answer too."""

from __future__ import annotations

from workers.context import Context
from workers.contract.errors import describe
from workers.contract.messages import ListMachines, MachinesListed


def list_machines(context: Context, command: ListMachines) -> MachinesListed:
    """Never raises."""
    answer = MachinesListed(hypervisor=command.hypervisor, asked=command.asked, disks=command.disks)
    try:
        hypervisor = context.hypervisor(command.hypervisor)
        machines = hypervisor.machines(disks=command.disks)
    except Exception as error:  # noqa: BLE001 - the border: whatever it is, nothing is known of its machines
        return answer.model_copy(update={"error": describe(error)})
    return answer.model_copy(update={"machines": machines, "complete": hypervisor.features.knows_off})
