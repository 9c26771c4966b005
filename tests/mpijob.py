"""The schema of Kubeflow's MPIJob, where it is at hand, and its operator's part of a job."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import yaml

from tests.launcher import ROOT

CRD = ROOT.parent / "shared" / "data" / "mpijob-crd" / "kubeflow.org_mpijobs.yaml"


@functools.cache
def schema() -> Any:
    """Of v2beta1, in which other properties, which the cluster would drop, are errors."""
    if not CRD.exists():
        pytest.skip("the schema of MPIJob is not at hand")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    (version,) = [each for each in yaml.load(CRD.read_text(), loader)["spec"]["versions"]
                  if each["name"] == "v2beta1"]
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """A schema of Kubernetes as JSON schema has it, without room for other properties."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def operator_environment(role: str, slots: int) -> dict[str, str]:
    """What the operator (v0.6) adds to the variables of a container, for Open MPI."""
    if role == "worker":
        return {"K_MPI_JOB_ROLE": role}
    return {"K_MPI_JOB_ROLE": role, "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
            "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
            "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
            "OMPI_MCA_orte_set_default_slots": str(slots), "NVIDIA_VISIBLE_DEVICES": "",
            "NVIDIA_DRIVER_CAPABILITIES": ""}


def worker_hosts(job: Any, namespace: str = "default") -> list[str]:
    """The names of the workers, as in the operator's hostfile."""
    name = job["metadata"]["name"]
    return [f"{name}-worker-{index}.{name}-worker.{namespace}.svc"
            for index in range(job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"])]
