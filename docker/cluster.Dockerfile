# hvdnoise's image and sshd, for runs across containers. docker/build.sh --target cluster builds
# it on top of the other one.
ARG IMAGE=hvdnoise:cpu

FROM $IMAGE
ARG SOURCE_DATE_EPOCH=0
ARG PACKAGES=locked
USER 0:0
RUN --mount=type=bind,source=docker,target=/mnt PACKAGES=$PACKAGES /mnt/stage.sh packages cluster \
    && /mnt/stage.sh cluster
USER 1000:1000
VOLUME /ssh
