"""A JobSet of Kubernetes (jobset.x-k8s.io/v1alpha2): one pod a machine, TPU slices or GPUs or neither.

Exit code 75 (a signal came, everything is saved) fails the Job by its podFailurePolicy, and the failurePolicy of the
JobSet answers that reason by starting all pods again without counting it; so does a pod that was evicted (condition
DisruptionTarget). All are started anew, rather than the one pod alone (action Ignore), because the others wait for it
in a collective. Other failures count towards maxRestarts.
"""

import json
import pathlib
import shlex
from typing import Any

from jaxmed.errors import EXIT_STOPPED, UserError
from jaxmed.launch import record, tpu
from jaxmed.launch.job import Job
from jaxmed.launch.options import JobSet, require

FILE = 'job.yaml'
CONFIG = '/etc/jaxmed/config.py'  # the key of a ConfigMap, mounted
FAILURES = 3  # restarts after failures other than exit code 75
_PORT = 8476


def check(o: JobSet) -> None:
  """Raises a UserError for options that are missing or contradict each other."""
  require(o, 'jobset', 'image')
  if o.tpu or o.topology:
    require(o, 'jobset', 'tpu', 'topology')
    tpu.of_topology(o.tpu, o.topology, o.chips_per_node)
    if o.gpus or o.nodes > 1:
      raise UserError('--tpu says how many pods there are by --topology and --slices: leave --gpus and --nodes out')
  elif o.slices > 1 or o.chips_per_node:
    raise UserError('--slices and --chips-per-node go with --tpu and --topology')


def _pods(o: JobSet) -> int:
  """Pods of one Job."""
  return tpu.of_topology(o.tpu, o.topology, o.chips_per_node).hosts if o.tpu else o.nodes


def devices(o: JobSet) -> tuple[int, str]:
  """The number of devices, and how it follows from the options."""
  if o.tpu:
    each = tpu.of_topology(o.tpu, o.topology, o.chips_per_node).devices
    return o.slices * each, f'{o.slices} slices of {o.tpu} {o.topology}'
  return o.nodes * max(o.gpus, 1), f'{o.nodes} nodes' + (f' x {o.gpus} GPUs' if o.gpus else '')


def shared(job: Job, o: JobSet) -> bool:
  """Whether RUN is on a volume that outlives pods."""
  folders = [m.partition(':')[2].rstrip('/') for m in (*o.claim, *o.bucket)]
  return any(job.out.startswith(f + '/') for f in folders)


def _environment(job: Job, o: JobSet) -> list[dict[str, Any]]:
  pods = _pods(o) * (o.slices if o.tpu else 1)
  env: list[dict[str, Any]] = [{'name': k, 'value': v} for k, v in job.variables().items()]
  if pods > 1:
    env.append({'name': 'JAX_NUM_PROCESSES', 'value': str(pods)})
  if pods > 1 and not o.tpu:  # GKE tells TPU pods of each other itself
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    env += [{'name': 'JAX_COORDINATOR_ADDRESS', 'value': f'{job.unique}-worker-0-0.{job.unique}:{_PORT}'},
            {'name': 'JAX_PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': index}}}]
  return env


def _volumes(job: Job, o: JobSet) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Volumes of a pod, and where its container mounts them."""
  volumes, mounts = [], []
  sources = [(m, 'claim') for m in o.claim] + [(m, 'bucket') for m in o.bucket]
  for i, (text, kind) in enumerate(sources):
    name, _, folder = text.partition(':')
    source: dict[str, Any] = {'persistentVolumeClaim': {'claimName': name}} if kind == 'claim' else {
        'csi': {'driver': 'gcsfuse.csi.storage.gke.io',
                'volumeAttributes': {'bucketName': name, 'mountOptions': 'implicit-dirs'}}}
    volumes.append({'name': f'data-{i}', **source})
    mounts.append({'name': f'data-{i}', 'mountPath': folder})
  if job.config:
    volumes.append({'name': 'config', 'configMap': {'name': f'{job.unique}-config'}})
    mounts.append({'name': 'config', 'mountPath': str(pathlib.PurePosixPath(CONFIG).parent)})
  if o.gpus > 1:  # NCCL passes data between GPUs of a pod through it; the default has 64 MB
    volumes.append({'name': 'shm', 'emptyDir': {'medium': 'Memory'}})
    mounts.append({'name': 'shm', 'mountPath': '/dev/shm'})
  return volumes, mounts


def _container(job: Job, o: JobSet, mounts: list[dict[str, Any]]) -> dict[str, Any]:
  amounts = {'cpu': o.cpu, 'memory': o.mem}
  if o.tpu:
    amounts['google.com/tpu'] = str(tpu.of_topology(o.tpu, o.topology, o.chips_per_node).chips)
  if o.gpus:
    amounts['nvidia.com/gpu'] = str(o.gpus)
  amounts = {k: v for k, v in amounts.items() if v}
  # exec: the process itself gets SIGTERM, and its exit code is the container's.
  command = ['bash', '-c', '\n'.join(['set -e', *o.setup, f'exec {job.line()}'])] if o.setup else job.command()
  container = {'name': 'train', 'image': o.image, 'command': command, 'env': _environment(job, o),
               'resources': {'requests': amounts, 'limits': dict(amounts)} if amounts else {}, 'volumeMounts': mounts}
  return {k: v for k, v in container.items() if v}


def _pod(job: Job, o: JobSet) -> dict[str, Any]:
  selector = {'cloud.google.com/gke-tpu-accelerator': o.tpu, 'cloud.google.com/gke-tpu-topology': o.topology,
              'cloud.google.com/gke-accelerator': o.gpu_type, 'cloud.google.com/gke-spot': 'true' if o.spot else ''}
  taints = {'cloud.google.com/gke-spot': o.spot, 'nvidia.com/gpu': o.gpus > 0}
  volumes, mounts = _volumes(job, o)
  spec = {
      'restartPolicy': 'Never', 'terminationGracePeriodSeconds': o.grace, 'serviceAccountName': o.service_account,
      'nodeSelector': {k: v for k, v in selector.items() if v},
      'tolerations': [{'key': k, 'operator': 'Exists', 'effect': 'NoSchedule'} for k, on in taints.items() if on],
      'containers': [_container(job, o, mounts)], 'volumes': volumes}
  pod: dict[str, Any] = {'spec': {k: v for k, v in spec.items() if v}}
  return ({'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}}} if o.bucket else {}) | pod


def manifest(job: Job, o: JobSet) -> dict[str, Any]:
  """The JobSet as plain data."""
  name = 'slice' if o.tpu else 'worker'
  again: list[dict[str, Any]] = [
      {'action': 'FailJob', 'onExitCodes': {'containerName': 'train', 'operator': 'In', 'values': [EXIT_STOPPED]}},
      {'action': 'FailJob', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]}]
  spec = {
      'parallelism': _pods(o), 'completions': _pods(o), 'completionMode': 'Indexed', 'backoffLimit': 0,
      'podFailurePolicy': {'rules': again}, 'template': _pod(job, o)}
  if job.cells:
    spec |= _cells(job, again)
  metadata: dict[str, Any] = {'name': job.unique}
  if o.namespace:
    metadata['namespace'] = o.namespace
  if o.queue:
    metadata['labels'] = {'kueue.x-k8s.io/queue-name': o.queue}
  if o.tpu and o.slices > 1:
    metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet', 'metadata': metadata,
      'spec': {
          'network': {'enableDNSHostnames': True},
          'failurePolicy': {
              # New pods begin once the old ones have saved and are gone.
              'restartStrategy': 'BlockingRecreate', 'maxRestarts': min(job.restarts, FAILURES),
              'rules': [{'name': 'saved', 'action': 'RestartJobSetAndIgnoreMaxRestarts',
                         'onJobFailureReasons': ['PodFailurePolicy']}] if job.restarts else []},
          'replicatedJobs': [{'name': name, 'replicas': o.slices if o.tpu else 1, 'template': {'spec': spec}}]}}


def _cells(job: Job, again: list[dict[str, Any]]) -> dict[str, Any]:
  """The Job of a study: a pod a cell, each started again by itself; a cell that fails stops no other.

  A pod that saved and ended, or was evicted, is made anew and not counted (Ignore); any other failure is its cell's
  last (backoffLimitPerIndex, Kubernetes 1.29 and newer).
  """
  return {'parallelism': min(job.at_once or job.cells, job.cells), 'completions': job.cells,
          'backoffLimit': job.cells * max(job.restarts, 1), 'backoffLimitPerIndex': 0, 'maxFailedIndexes': job.cells,
          'podFailurePolicy': {'rules': [rule | {'action': 'Ignore'} for rule in again]}}


def config_map(job: Job, o: JobSet) -> dict[str, Any]:
  """The config file that is here, for the pods."""
  where = {'namespace': o.namespace} if o.namespace else {}
  return {'apiVersion': 'v1', 'kind': 'ConfigMap', 'metadata': {'name': f'{job.unique}-config', **where},
          'data': {pathlib.PurePosixPath(CONFIG).name: pathlib.Path(job.config).read_text(encoding='utf-8')}}


def script(job: Job, o: JobSet) -> str:
  """The manifest as YAML."""
  import yaml

  class Dumper(yaml.SafeDumper):
    """Lines of a shell stay lines."""

  Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
      'tag:yaml.org,2002:str', text, '|' if '\n' in text else None))
  parts = [*([config_map(job, o)] if job.config else []), manifest(job, o)]
  text = '---\n'.join(yaml.dump(p, Dumper=Dumper, sort_keys=False, width=110) for p in parts)
  return f'# Written by jaxmed {"study" if job.cells else "launch jobset"}: kubectl create -f {FILE}\n{text}'


def _kubectl(values: dict[str, Any], *words: str) -> list[str]:
  return ['kubectl', *words, *([f'--namespace={values["namespace"]}'] if values.get('namespace') else [])]


def submit(job: Job, o: JobSet) -> dict[str, Any]:
  """Gives the manifest to kubectl: {'job': name, 'namespace'}."""
  values = {'job': job.unique, 'namespace': o.namespace}
  now = state(values)
  if now.alive:
    raise UserError(f'{now.text}: it was launched from somewhere else; kubectl delete jobset {job.unique} ends it')
  _delete(values, '--wait=true')  # what an ended one left
  record.call(_kubectl(values, 'create', '-f', str(job.place / FILE)), 'kubectl did not take the JobSet')
  return values


def _delete(values: dict[str, Any], *words: str) -> None:
  for kind, name in (('jobset', values['job']), ('configmap', f'{values["job"]}-config')):
    record.call(_kubectl(values, 'delete', kind, name, '--ignore-not-found', *words), 'kubectl delete failed')


def state(values: dict[str, Any]) -> record.State:
  """What Kubernetes says of the JobSet."""
  done = record.attempt(_kubectl(values, 'get', 'jobset', values['job'], '--output=json'))
  if done.returncode:
    said = ' '.join(done.stderr.split())[-200:]
    return record.State(False if 'NotFound' in said else None, f'JobSet {values["job"]}: {said}')
  status = json.loads(done.stdout).get('status', {})
  end = status.get('terminalState', '')
  jobs = status.get('replicatedJobsStatus', [])
  text = end or f'{sum(j.get("ready", 0) for j in jobs)} jobs ready, {sum(j.get("failed", 0) for j in jobs)} failed'
  return record.State(not end, f'JobSet {values["job"]}: {text}, {status.get("restarts", 0)} restarts')


def stop(values: dict[str, Any]) -> str:
  """Deletes the JobSet: its pods get SIGTERM and their grace period to save."""
  _delete(values, '--wait=false')
  return f'JobSet {values["job"]}: deleted, its pods save and end'


def log(values: dict[str, Any]) -> str:
  """The command that shows its output."""
  return shlex.join(_kubectl(values, 'logs', '-f', '-l', f'jobset.sigs.k8s.io/jobset-name={values["job"]}',
                             '--all-containers', '--prefix'))
