// Compresses an ONNX model through a server, from Go: see README.md.
//
// COMPRESS_TOKEN: the token, where the server asks for one (over TLS: see credentials.NewTLS).

package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"math"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pb "modelpress/v1"
)

const (
	parent     = "projects/default"
	chunkBytes = 1024 * 1024
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func main() {
	if len(os.Args) < 3 {
		log.Fatal("usage: compress MODEL.onnx OUTPUT.onnx [localhost:50051]")
	}
	address := "localhost:50051"
	if len(os.Args) > 3 {
		address = os.Args[3]
	}
	ctx := context.Background()
	if token := os.Getenv("COMPRESS_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	if err := compress(ctx, address, os.Args[1], os.Args[2]); err != nil {
		log.Fatal(err)
	}
}

func compress(ctx context.Context, address, modelPath, outputPath string) error {
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		return err
	}
	defer connection.Close()
	uploads, models, jobs := pb.NewUploadServiceClient(connection), pb.NewModelServiceClient(connection), pb.NewJobServiceClient(connection)

	content, err := os.ReadFile(modelPath)
	if err != nil {
		return err
	}
	digest, err := upload(ctx, uploads, content)
	if err != nil {
		return err
	}
	files := []*pb.FileEntry{{Path: filepath.Base(modelPath), Digest: digest}}
	// With an id of its own, a request that is repeated makes no second model or job.
	model, err := models.CreateModel(ctx, &pb.CreateModelRequest{Parent: parent, Model: &pb.Model{Files: files}, RequestId: newID()})
	if err != nil {
		return err
	}
	spec := &pb.JobSpec{Model: model.Name}
	job, err := jobs.CreateJob(ctx, &pb.CreateJobRequest{Parent: parent, Job: &pb.Job{Spec: spec}, RequestId: newID()})
	if err != nil {
		return err
	}
	if job, err = watch(ctx, jobs, job.Name); err != nil {
		return err
	}
	if job.State != pb.JobState_JOB_STATE_SUCCEEDED {
		return fmt.Errorf("%s: %s", job.State, job.GetError().GetMessage())
	}
	for _, artifact := range job.Artifacts {
		if artifact.Kind != pb.Artifact_KIND_OPTIMIZED_MODEL {
			continue
		}
		result, err := download(ctx, uploads, artifact.Files[0].Digest)
		if err != nil {
			return err
		}
		if err := os.WriteFile(outputPath, result, 0o666); err != nil {
			return err
		}
	}
	before, after := job.Summary.OriginalSizeBytes, job.Summary.OptimizedSizeBytes
	fmt.Printf("%s: %.2f times smaller\n", outputPath, float64(before)/float64(after))
	return nil
}

func upload(ctx context.Context, uploads pb.UploadServiceClient, content []byte) (*pb.Digest, error) {
	sum := sha256.Sum256(content)
	digest := &pb.Digest{Sha256: sum[:], SizeBytes: int64(len(content))}
	known, err := uploads.FindMissingBlobs(ctx, &pb.FindMissingBlobsRequest{Parent: parent, Digests: []*pb.Digest{digest}})
	if err != nil || len(known.Missing) == 0 { // it is there already
		return digest, err
	}
	begun, err := uploads.CreateUpload(ctx, &pb.CreateUploadRequest{Parent: parent, Digest: digest})
	if err != nil {
		return nil, err
	}
	stream, err := uploads.WriteUpload(ctx)
	if err != nil {
		return nil, err
	}
	name := begun.Name // in the first message alone
	for offset, size := int(begun.CommittedSize), len(content); ; name = "" {
		end := int(math.Min(float64(offset+chunkBytes), float64(size)))
		data := content[offset:end]
		err := stream.Send(&pb.WriteUploadRequest{
			Name: name, WriteOffset: int64(offset), Data: data, Crc32C: crc32.Checksum(data, castagnoli), FinishWrite: end == size,
		})
		if offset = end; err != nil || offset == size { // the answers say what is wrong
			break
		}
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			return digest, nil
		} else if err != nil {
			return nil, err
		}
	}
}

// watch shows the progress of a job, and returns it once it has ended.
func watch(ctx context.Context, jobs pb.JobServiceClient, name string) (job *pb.Job, err error) {
	stream, err := jobs.WatchJob(ctx, &pb.WatchJobRequest{Name: name})
	if err != nil {
		return nil, err
	}
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return job, nil
		} else if err != nil {
			return nil, err
		}
		if snapshot := event.GetSnapshot(); snapshot != nil {
			job = snapshot
		} else if progress := event.GetProgress(); progress != nil {
			fmt.Printf("%.0f %% %s %s\n", 100*progress.Fraction, progress.Stage, progress.Message)
		}
	}
}

func download(ctx context.Context, uploads pb.UploadServiceClient, digest *pb.Digest) ([]byte, error) {
	stream, err := uploads.ReadBlob(ctx, &pb.ReadBlobRequest{Parent: parent, Digest: digest})
	if err != nil {
		return nil, err
	}
	var content []byte
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if crc32.Checksum(part.Data, castagnoli) != part.Crc32C {
			return nil, errors.New("a part came damaged")
		}
		content = append(content, part.Data...)
	}
	if sum := sha256.Sum256(content); string(sum[:]) != string(digest.Sha256) {
		return nil, errors.New("the file came damaged")
	}
	return content, nil
}

// newID returns a random UUID (RFC 9562, version 4).
func newID() string {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		log.Fatal(err)
	}
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}
