"""What a cluster takes back, and what it should have back.

Placement groups of trainers whose controller was killed: Ray keeps what they reserved for as long as the driver lives, so
that nobody could train there any more. And nodes that are about to be taken away.
"""

from __future__ import annotations

from contextlib import suppress


def free() -> int:
    """Give back what dead actors of this run had reserved; how many groups that were. Other jobs are left alone."""
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util import placement_group as groups

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    num = 0
    for text in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(text)
        if (
            group.state == gcs_pb2.PlacementGroupTableData.REMOVED
            or group.creator_job_id != job
            or not group.creator_actor_dead
            or not group.creator_actor_id.strip(b"\xff")  # made by no actor
        ):
            continue
        with suppress(Exception):  # somebody was first
            groups.remove_placement_group(groups.PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            num += 1
    return num


def draining() -> set[str]:
    """Nodes that take nothing new and will soon be gone: the first eight digits of their ids."""
    from ray._private.state import state

    return {node[:8] for node in state.get_draining_nodes()}
