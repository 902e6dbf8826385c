"""Resources to return to a cluster, and nodes that a cluster takes away.

The resources are placement groups of trainers whose controller was killed. Ray keeps what they reserved for as long as
the driver lives, so that no other trainer could use it.
"""

from __future__ import annotations


def free() -> int:
    """Return the resources that dead actors of this run had reserved. Returns the number of placement groups. Other
    jobs are not touched."""
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    num = 0
    for text in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(text)
        if (
            group.state == gcs_pb2.PlacementGroupTableData.REMOVED
            or group.creator_job_id != job
            or not group.creator_actor_dead
            or not group.creator_actor_id.strip(b"\xff")  # not made by an actor
        ):
            continue
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        num += 1
    return num


def draining() -> set[str]:
    """Nodes that take no new work and will soon be gone, as the first eight digits of their ids."""
    from ray._private.state import state

    return {node[:8] for node in state.get_draining_nodes()}
