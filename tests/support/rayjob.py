"""What a RayJob may hold, as a strict JSON schema: a key that is not in it is an error.

KubeRay's part has all fields of the API reference of KubeRay 1.7 (ray.io/v1), those
deeper in that launchers/kuberay.yaml does not use without their own fields. Of
Kubernetes' pods it has what that file uses; another field is added here with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITIES: Schema = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
ANY_OBJECT: Schema = {"type": "object"}


def fields(required: str = "", **properties: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(item: Schema) -> Schema:
    return {"type": "array", "items": item}


VOLUME = fields(
    "name",
    name=TEXT,
    persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=FLAG),
    emptyDir=fields(medium=TEXT, sizeLimit={"type": ["integer", "string"]}),
)
HOOK = fields(exec=fields(command=several(TEXT)))
CONTAINER = fields(
    "name",
    name=TEXT,
    image=TEXT,
    lifecycle=fields(preStop=HOOK, postStart=HOOK),
    env=several(fields("name", name=TEXT, value=TEXT)),
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=several(fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
POD = fields(
    metadata=ANY_OBJECT,
    spec=fields(
        "containers",
        terminationGracePeriodSeconds=WHOLE,
        containers=several(CONTAINER),
        volumes=several(VOLUME),
    ),
)
HEAD = fields(
    "template",
    template=POD,
    headService=ANY_OBJECT,
    enableIngress=FLAG,
    ingressOptions=ANY_OBJECT,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=TEXT,
)
WORKERS = fields(
    "groupName minReplicas maxReplicas template",
    suspend=FLAG,
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    idleTimeoutSeconds=WHOLE,
    priority=WHOLE,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=POD,
    scaleStrategy=ANY_OBJECT,
    numOfHosts=WHOLE,
)
AUTH = fields(
    enableK8sTokenAuth=FLAG,
    secretName=TEXT,
    mode={"type": "string", "enum": ["disabled", "token"]},
)
CLUSTER = fields(
    "headGroupSpec",
    upgradeStrategy=ANY_OBJECT,
    authOptions=AUTH,
    suspend=FLAG,
    managedBy=TEXT,
    autoscalerOptions=ANY_OBJECT,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY_OBJECT,
    historyServerOptions=ANY_OBJECT,
    networkPolicy=ANY_OBJECT,
    tlsOptions=ANY_OBJECT,
    headGroupSpec=HEAD,
    rayVersion=TEXT,
    workerGroupSpecs=several(WORKERS),
)
RAY_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
    spec=fields(
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        rayClusterSpec=CLUSTER,
        submitterPodTemplate=POD,
        clusterSelector=TEXTS,
        submitterConfig=ANY_OBJECT,
        managedBy=TEXT,
        deletionStrategy=ANY_OBJECT,
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        jobId=TEXT,
        submissionMode=TEXT,
        entrypointResources=TEXT,
        entrypointNumCpus=NUMBER,
        entrypointNumGpus=NUMBER,
        ttlSecondsAfterFinished=WHOLE,
        preRunningDeadlineSeconds=WHOLE,
        shutdownAfterJobFinishes=FLAG,
        suspend=FLAG,
    ),
)


def schema_of(definition: Path) -> Schema:
    """The schema of ray.io/v1 in KubeRay's own file
    of it, ray.io_rayjobs.yaml, made as strict.
    """
    versions = yaml.safe_load(definition.read_text())["spec"]["versions"]
    (schema,) = (one["schema"] for one in versions if one["name"] == "v1")
    found: Schema = schema["openAPIV3Schema"]
    _make_strict(found)
    # Kubernetes itself knows what metadata holds.
    found["properties"]["metadata"] = RAY_JOB["properties"]["metadata"]
    return found


def _make_strict(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        for value in schema.values():
            _make_strict(value)
    elif isinstance(schema, list):
        for value in schema:
            _make_strict(value)
