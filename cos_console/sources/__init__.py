"""Where an image comes from: resolved once, pinned by digest, streamed layer by layer."""

from collections.abc import Callable

from cos_console.model.image import Content, ImageReference, Platform, ResolvedImage, Transport
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources.reference import parse_reference
from cos_console.sources.settings import SourceSettings

__all__ = ["SourceSettings", "list_tags", "open_pinned", "parse_reference", "resolve"]


def resolve(
    reference: ImageReference,
    settings: SourceSettings,
    platform: Platform | None = None,
    report: Callable[[int, int, str], None] | None = None,
) -> Content:
    """Find the image, choose the platform, read its manifest and configuration; no layer is fetched yet.

    `report(bytes had, bytes in all, words)` hears of a pull that a Docker Engine does meanwhile.
    Raises Problem when the image can't be found, reached or understood.
    """
    from cos_console.sources import docker_engine, oci_layout, registry
    from cos_console.sources.archive import open_docker_archive, open_oci_archive
    from cos_console.sources.directory import DirectoryContent

    wanted = platform or settings.platform
    match reference.transport:
        case Transport.OCI:
            return oci_layout.open_layout(reference, wanted)
        case Transport.OCI_ARCHIVE:
            return open_oci_archive(reference, wanted)
        case Transport.DOCKER_ARCHIVE:
            return open_docker_archive(reference, wanted)
        case Transport.DOCKER:
            return registry.open_registry(reference, settings, wanted)
        case Transport.DOCKER_DAEMON:
            return docker_engine.open_engine(reference, settings, wanted, report)
        case Transport.DIRECTORY:
            return DirectoryContent(reference)
        case Transport.SLOT:
            raise Problem(
                "COS-REFERENCE",
                "A slot is not an image source.",
                now="Use restore instead.",
                exit_code=ExitCode.USAGE,
            )


def open_pinned(image: ResolvedImage, settings: SourceSettings) -> Content:
    """The very image of a plan again, by its digest. Raises Problem COS-IMAGE-MOVED when it is another one."""
    content = resolve(image.reference, settings.pinned(image), image.platform)
    if content.image.digest != image.digest or content.image.layers != image.layers:
        content.close()
        raise Problem(
            "COS-IMAGE-MOVED",
            f"{image.reference} is another image now than the one that was planned.",
            now="Make a new plan.",
            exit_code=ExitCode.SOURCE,
        )
    return content


def list_tags(reference: ImageReference, settings: SourceSettings) -> tuple[str, ...]:
    """The tags of the repository that `reference` names, in the registry's order. Raises Problem."""
    from cos_console.sources import registry

    return registry.list_tags(reference, settings)
